"""Small CIFAR-100 look-alikes in every layout, all with the same content."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lsmha_fast.data.cifar100_names import (
    BINARY_ARCHIVE,
    COARSE_NAMES,
    COARSE_OF_FINE,
    FINE_NAMES,
    PYTHON_ARCHIVE,
)


class Content(NamedTuple):
    images: np.ndarray  # (M, 3, 32, 32) uint8
    fine: np.ndarray  # (M,)
    coarse: np.ndarray  # (M,)


def content(split: str, per_class: int = 2) -> Content:
    """Random images sorted by class, as a folder layout yields them."""
    rng = np.random.default_rng(["train", "test"].index(split))
    fine = np.repeat(np.arange(100), per_class)
    images = rng.integers(0, 256, (len(fine), 3, 32, 32), dtype=np.uint8)
    return Content(images, fine, np.array(COARSE_OF_FINE)[fine])


def binary_files(per_class: int = 2) -> dict[str, bytes]:
    files = {
        "fine_label_names.txt": "\n".join(FINE_NAMES).encode() + b"\n",
        "coarse_label_names.txt": "\n".join(COARSE_NAMES).encode() + b"\n",
    }
    for split in ("train", "test"):
        images, fine, coarse = content(split, per_class)
        labels = np.stack([coarse, fine], 1).astype(np.uint8)
        records = np.concatenate([labels, images.reshape(len(fine), -1)], 1)
        files[f"{split}.bin"] = records.tobytes()
    return files


def python_files() -> dict[str, bytes]:
    files = {
        "meta": pickle.dumps(
            {"fine_label_names": list(FINE_NAMES), "coarse_label_names": list(COARSE_NAMES)}, 2
        )
    }
    for split in ("train", "test"):
        images, fine, coarse = content(split)
        entry = {
            "data": images.reshape(len(fine), -1),
            "fine_labels": fine.tolist(),
            "coarse_labels": coarse.tolist(),
            "batch_label": split,
        }
        files[split] = pickle.dumps(entry, 2)
    return files


def png(image: np.ndarray) -> bytes:
    """(3, H, W) uint8 to PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    """A .tar.gz with `extra` members (links, say) before the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member in extra:
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_binary(root: Path) -> None:
    write_files(root / "cifar-100-binary", binary_files())


def write_binary_archive(root: Path) -> None:
    files = {f"cifar-100-binary/{name}": data for name, data in binary_files().items()}
    write_tar(root / BINARY_ARCHIVE, files)


def write_python(root: Path) -> None:
    write_files(root / "cifar-100-python", python_files())


def write_python_archive(root: Path) -> None:
    files = {f"cifar-100-python/{name}": data for name, data in python_files().items()}
    write_tar(root / PYTHON_ARCHIVE, files)


def write_parquet(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, fine, coarse = content(split)
        cells = [{"bytes": png(image), "path": None} for image in images]
        table = pa.table({"img": cells, "fine_label": fine, "coarse_label": coarse})
        pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")


def write_folder(root: Path) -> None:
    for split in ("train", "test"):
        images, fine, _ = content(split)
        for i, (image, label) in enumerate(zip(images, fine, strict=True)):
            write_files(root / split / FINE_NAMES[label], {f"{i:05d}.png": png(image)})


WRITERS = {
    "binary": write_binary,
    "binary archive": write_binary_archive,
    "python": write_python,
    "python archive": write_python_archive,
    "parquet": write_parquet,
    "folder": write_folder,
}
