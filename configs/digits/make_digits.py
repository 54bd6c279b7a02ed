"""Writes the digits dataset from the copy inside scikit-learn.

    python make_digits.py [FOLDER]      (default: the folder of this file)

Needs numpy, safetensors and scikit-learn; takes a second. The same digits give the same bytes.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

NUM_CLASSES = 10
# Pixels are counts from 0 to 16, so pixel / 8 - 1 lies in [-1, 1] and is exact in f16.
HALF_OF_WHITE = 8.0


def prompts(labels: np.ndarray) -> np.ndarray:
    """One token a prompt, which is the class as a one-hot vector: [N, 1, 10] f16."""
    return np.eye(NUM_CLASSES, dtype=np.float16)[labels][:, None, :]


def write_samples(path: Path) -> int:
    """Writes all pictures with their prompts and classes, and says how many they are."""
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    latents = (digits.images / HALF_OF_WHITE - 1.0).astype(np.float16)[:, None]
    save_file({"image_latents": latents, "text_embeddings": prompts(labels), "labels": labels}, path)
    return len(labels)


def write_conditions(path: Path) -> None:
    """Writes one prompt for each class: what samples are generated from."""
    labels = np.arange(NUM_CLASSES, dtype=np.int64)
    save_file({"text_embeddings": prompts(labels), "labels": labels}, path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the digits dataset.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    folder = parser.parse_args().folder
    num_samples = write_samples(folder / "digits.safetensors")
    write_conditions(folder / "conditions.safetensors")
    dataset = {
        "format": "fm-dist dataset",
        "version": 1,
        "name": "digits",
        "source": "UCI Optical Recognition of Handwritten Digits, test part (E. Alpaydin, C. Kaynak, 1998), doi:10.24432/C50P49",
        "licence": "CC BY 4.0",
        "data_type": "image",
        "files": [
            {
                "path": "digits.safetensors",
                "samples": num_samples,
                "group": "8x8",
                "sha256": sha256(folder / "digits.safetensors"),
            }
        ],
        "conditions": {
            "path": "conditions.safetensors",
            "names": [str(label) for label in range(NUM_CLASSES)],
            "sha256": sha256(folder / "conditions.safetensors"),
        },
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n")


if __name__ == "__main__":
    main()
