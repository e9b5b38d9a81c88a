"""Data sets as two tensors with names, augmentation on the device, and batches."""

from .augment import Augment as Augment
from .augment import default_augment as default_augment
from .augment_config import AugmentConfig as AugmentConfig
from .augment_config import default_config as default_config
from .batches import Batches as Batches
from .batches import normalize as normalize
from .dataset import ImageDataset as ImageDataset
from .errors import DatasetError as DatasetError
from .fetch import fetch_cifar100 as fetch_cifar100
from .mix import mixup_cutmix as mixup_cutmix
from .picture import contact_sheet as contact_sheet
from .pipelines import PIPELINES as PIPELINES
from .pipelines import make_batches as make_batches
from .registry import DATASETS as DATASETS
from .registry import describe as describe
from .registry import load_dataset as load_dataset
from .registry import verify as verify
from .training_batches import TrainingBatches as TrainingBatches
