"""What is fixed about CIFAR-100: names, the 20 x 5 hierarchy, counts, hashes, addresses."""

from __future__ import annotations

# the official order of both levels is alphabetical
HIERARCHY = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
COARSE_NAMES = tuple(HIERARCHY)
FINE_NAMES = tuple(sorted(name for members in HIERARCHY.values() for name in members))
_GROUP = {name: g for g, members in enumerate(HIERARCHY.values()) for name in members}
COARSE_OF_FINE = tuple(_GROUP[name] for name in FINE_NAMES)

SIDE = 32
PIXELS = 3 * SIDE * SIDE
COUNTS = {"train": 50_000, "test": 10_000}
# of the training images; the values every published CIFAR-100 recipe uses
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)

BINARY_ARCHIVE = "cifar-100-binary.tar.gz"
PYTHON_ARCHIVE = "cifar-100-python.tar.gz"
BINARY_URL = f"https://www.cs.toronto.edu/~kriz/{BINARY_ARCHIVE}"
BINARY_BYTES = 168_513_733
# binary archive: tensorflow/datasets, url_checksums/cifar100.txt; the rest: torchvision, cifar.py
KNOWN_HASHES = {
    BINARY_ARCHIVE: ("sha256", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
    PYTHON_ARCHIVE: ("md5", "eb9058c3a382ffc7106e4002c42a8d85"),
    "train": ("md5", "16019d7e3df5f24257cddd939b257f8d"),
    "test": ("md5", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
    "meta": ("md5", "7973b15100ade9c7d40fb424638fde48"),
}
