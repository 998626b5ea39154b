"""Edits that damage a file where its format is weakest; each takes bytes and a random generator."""

from __future__ import annotations

import ast
import copy
import gzip
import hashlib
import io
import json
import pickle
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minillm.weights import gguf_file

Edit = Callable[[bytes, random.Random], bytes]

WHOLE = [0, 1, -1, 2, 7, 255, 256, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
WHOLE += [(1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**20, 10**309, 10**4400]
WORDS = ["", " ", "\0", "a" * 5000, "../../x", "/proc/version", "~", "é\u202e", "\ud800", "None"]
WORDS += ["nan", "1e999", "-", "--", "%s%n", "{0.__class__}", "{{ 7 * 7 }}", "$(touch canary)"]
WORDS += ["__import__('os').system('touch canary')", "\ufeff", "\n", "\r\n\t", "0x10", "1_0", "٣"]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"": None}, 0.5, -0.0, 1e308, 1e-320]
OTHERS += [float("inf"), float("nan")]


class Payload:
    """Object whose pickle runs a command that leaves a file."""

    def __reduce__(self) -> Any:
        return eval, ("open('canary', 'w')",)


# ---- bytes and lines


def raw(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or erase bytes, one to three times."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_RAW)(data, rng)
    return data


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice([1, 2, 4, 8, 100, 5000]))


def _flip(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        if found:
            at = rng.randrange(min(len(found), rng.choice([64, 4096, len(found)])))
            found[at] ^= 1 << rng.randrange(8)
    return bytes(found)


def _word(data: bytes, rng: random.Random) -> bytes:
    """Replace an aligned word near the beginning by a telling number."""
    width = rng.choice([1, 2, 4, 8])
    if len(data) < width:
        return b""
    at = rng.randrange(min(len(data), 2048) // width) * width
    value = rng.choice(WHOLE) & ((1 << 8 * width) - 1)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([0, 1, 8, len(data) // 2, max(0, len(data) - rng.randint(1, 9))])]


def _erase(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _zero(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.choice([b"\0", b"\xff"]) * (end - start) + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice([1, 3, 300]) + data[end:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(WORDS).encode("utf-8", "surrogatepass") + data[at:]


_RAW = (_flip, _word, _cut, _erase, _zero, _repeat, _insert)


def lines(data: bytes, rng: random.Random) -> bytes:
    """Drop, repeat, swap or change lines and their fields of a text."""
    rows = data.split(b"\n")
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(rows)), rng.randrange(8)
        if kind == 0 and len(rows) > 1:
            del rows[at]
        elif kind == 1:
            rows.insert(at, rows[rng.randrange(len(rows))])
        elif kind == 2:
            rows[at] = b"" if rows[at].strip() else b"x"
        elif kind == 3:
            old, new = rng.sample([b"\t", b" ", b",", b"=", b"-", b'"', b"\r", b"\0"], 2)
            rows[at] = rows[at].replace(old, new, rng.choice([1, -1]))
        elif kind == 4:
            rows[at] += rng.choice([b"\t", b" ", b"=", b"\r", b"\t" * 99, b" #", b"\x85", b"\xff"])
        elif kind == 5:
            fields = rows[at].split(b" ")
            fields[rng.randrange(len(fields))] = _scalar(rng)
            rows[at] = b" ".join(fields)
        elif kind == 6:
            rows = rng.sample(rows, len(rows))
        else:
            rows[at] = raw(rows[at], rng)
        rows = rows or [b""]
    return b"\n".join(rows)


def _scalar(rng: random.Random) -> bytes:
    value = rng.choice([rng.choice(WHOLE), rng.choice(WORDS), rng.choice(OTHERS)])
    return (value if isinstance(value, str) else str(value)[:5000] if not isinstance(value, int)
            else _digits(value)).encode("utf-8", "surrogatepass")  # fmt: skip


def _digits(value: int) -> str:
    """Return the decimal digits of a number of any size: str() refuses more than 4300."""
    return str(value) if abs(value) < 10**4000 else "1" + "0" * 4400


# ---- JSON and TOML


def changed(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one to three of its parts replaced, removed, renamed or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        value = _changed(value, rng)
    return value


def _changed(value: Any, rng: random.Random) -> Any:
    # Deeper with every level: parts at all depths have a chance.
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.7:
            value[key] = _changed(value[key], rng)
            return value
        kind = rng.randrange(4)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice([*WORDS, str(key) + "x"])] = value.pop(key)
        elif kind == 1:
            value.insert(key, copy.deepcopy(value[rng.randrange(len(value))]))
        elif isinstance(value, dict):
            other = rng.choice(list(value))
            value[key], value[other] = value[other], value[key]
        else:
            rng.shuffle(value)
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 1000, str(value), [value]])
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice([value.upper(), value + "x", value[:-1], value * 3, [value], value[::-1]])
    return rng.choice([rng.choice(WHOLE[:-1]), rng.choice(WORDS), rng.choice(OTHERS)])


def dumped(value: Any, rng: random.Random) -> str:
    """Return the text of a JSON value; now and then one number has too many digits or brackets."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.06:
        digits = [at for at, c in enumerate(text) if c.isdigit()]
        if digits:
            at = rng.choice(digits)
            new = rng.choice(["1e999", "1" + "0" * 4400, "[" * 100_000, '{"a":' * 50_000, "NaN"])
            text = text[:at] + new + text[at + 1 :]
    return text


def json_file(data: bytes, rng: random.Random) -> bytes:
    """Change the value of a JSON file, or one time in five its bytes."""
    if rng.random() < 0.2:
        return raw(data, rng)
    return dumped(changed(json.loads(data), rng), rng).encode("utf-8", "surrogatepass")


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """Change the value of one line of JSON, or the lines."""
    if rng.random() < 0.4:
        return lines(data, rng)
    rows = data.splitlines()
    at = rng.randrange(len(rows))
    rows[at] = dumped(changed(json.loads(rows[at]), rng), rng).encode("utf-8", "surrogatepass")
    return b"\n".join(rows) + b"\n"


def toml(data: bytes, rng: random.Random) -> bytes:
    """Change values, names and lines of a TOML file."""
    if rng.random() < 0.2:
        return raw(data, rng)
    rows = data.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(rows))
        name, _, value = rows[at].lstrip("# ").partition(" = ")
        word = json.dumps(rng.choice(WORDS))
        other = rng.choice([word, _digits(rng.choice(WHOLE)), "true", "[1, 2]", "nan", "-inf"])
        other = rng.choice([other, "{a = 1}", "1979-05-27", "0.5", "[" * 3000, "'x", value])
        rows[at] = rng.choice(
            [f"{name} = {other}", f"{name}x = {value}", f"[{name}]", f"{name} = {other}", rows[at]]
        )
        if rng.random() < 0.2:
            rows.insert(at, rows[rng.randrange(len(rows))])
    return "\n".join(rows).encode("utf-8", "surrogatepass")


# ---- binary formats


def npy(data: bytes, rng: random.Random) -> bytes:
    """Change the header of an array file, its bytes, or make it an array of pickled objects."""
    if rng.random() < 0.3:
        return raw(data, rng)
    if rng.random() < 0.1:
        stream = io.BytesIO()
        np.save(stream, np.array([Payload(), 1], object), allow_pickle=True)
        return stream.getvalue()
    if rng.random() < 0.05:
        return pickle.dumps(Payload())
    length = struct.unpack("<H", data[8:10])[0]
    header = changed(_plain(ast.literal_eval(data[10 : 10 + length].decode("latin1"))), rng)
    if isinstance(header, dict) and rng.random() < 0.6:
        shape = header.get("shape")
        header["shape"] = tuple(shape) if isinstance(shape, list) else shape
    kinds = ["<u2", "<i8", ">u4", "|O", "<f8", "<U9", "<m8[s]", "|V7", "<c16", "[('a', '<u2')]"]
    if isinstance(header, dict) and rng.random() < 0.3:
        header["descr"] = rng.choice(kinds)
    text = ascii(header).encode()[:60_000] + b"\n"
    version = rng.choice([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)])
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) + rng.choice([0, 0, 0, 1, -1]))
    return data[:6] + bytes(version) + size + text + data[10 + length :]


def _plain(value: Any) -> Any:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in value.items()}


def packed(data: bytes, rng: random.Random) -> bytes:
    """Change the text of a gzip file, or its bytes; now and then it expands to 400 MB."""
    if rng.random() < 0.05:
        return gzip.compress(b"a line of text\n" * (400_000_000 // 15), 1)
    if rng.random() < 0.5:
        return raw(data, rng)
    return gzip.compress(raw(gzip.decompress(data), rng))


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, its length, or bytes of the tensors."""
    if rng.random() < 0.2:
        return raw(data, rng)
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.25:
        values = bytearray(tensors)
        bad = rng.choice([np.nan, np.inf, 3e38, -0.0, 1e-40])
        at = rng.randrange(max(1, len(values) // 4)) * 4
        values[at : at + 4] = np.float32(bad).tobytes()
        tensors = bytes(values)
    else:
        header = dumped(changed(json.loads(header), rng), rng).encode("utf-8", "surrogatepass")
    length = len(header) if rng.random() < 0.85 else rng.choice(WHOLE[:-3]) & ((1 << 64) - 1)
    return length.to_bytes(8, "little") + header + tensors


def gguf(data: bytes, rng: random.Random) -> bytes:
    """Change the metadata of a GGUF file, or its bytes."""
    if rng.random() < 0.5:
        return raw(data, rng)
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder, "model.gguf"), Path(folder, "other.gguf")
        path.write_bytes(data)
        file = gguf_file.GGUFFile(path)
        kept = changed(file.metadata, rng)
        kept = kept if isinstance(kept, dict) else {}
        metadata = {str(name): value for name, value in kept.items() if _writable(value)}
        tensors = {name: (entry.form, entry.shape) for name, entry in file.entries.items()}
        if rng.random() < 0.3:
            name = rng.choice(list(tensors))
            form, shape = tensors.pop(name)
            tensors[name + rng.choice(["", "x"])] = form, shape[::-1]
        names = [name if name in file.entries else name[:-1] for name in tensors]
        blocks = [_all_of(file, name) for name in names]
        try:
            gguf_file.write(other, metadata, tensors, blocks)
        except (struct.error, OverflowError, ValueError):  # numbers that the format cannot hold
            return raw(data, rng)
        return other.read_bytes()


def _all_of(file: gguf_file.GGUFFile, name: str) -> np.ndarray:
    return file.read(name, tuple(slice(0, size) for size in file.entries[name].shape))


def _writable(value: Any) -> bool:
    """Return True for a value that a GGUF file can hold."""
    one = isinstance(value, str | bool | int | float)
    many = isinstance(value, list) and len({type(each) for each in value}) == 1
    return one or (many and isinstance(value[0], str | bool | int | float))


# ---- files that vouch for each other


def manifest(data: bytes, rng: random.Random) -> bytes:
    """Change a manifest, and mostly give it a checksum that fits."""
    if rng.random() < 0.2:
        return raw(data, rng)
    body = json.loads(data)
    body.pop("sha256")
    for name in ("meta", "tensors", "files"):
        if rng.random() < 0.5:
            body[name] = changed(body[name], rng)
            break
    else:
        body = changed(body, rng)
    return with_checksum(body, rng)


def with_checksum(body: Any, rng: random.Random) -> bytes:
    """Return the text of a manifest with its checksum."""
    if isinstance(body, dict):
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body = body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return dumped(body, rng).encode("utf-8", "surrogatepass")


def refit(file: Path) -> None:
    """Give the manifest beside a changed file of a checkpoint its size and checksum."""
    path = file.parent / "manifest.json"
    body, content = json.loads(path.read_bytes()), file.read_bytes()
    body.pop("sha256")
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    body["files"][file.name] = entry
    path.write_bytes(with_checksum(body, random.Random(1)))


# ---- command lines


def command(words: list[str], rng: random.Random) -> list[str]:
    """Change the values, names and order of the words of a command line."""
    words = list(words)
    for _ in range(rng.randint(1, 3)):
        if not words:
            return [rng.choice(["--help", "-x", ""])]
        at = rng.randrange(len(words))
        if words[at].startswith("--") and rng.random() < 0.5:
            at = min(at + 1, len(words) - 1)
        kind = rng.randrange(9)
        if kind < 4:
            # A path that is asked for may be written: none outside of the folder of the case.
            plain = [word for word in WORDS if "/" not in word]
            value = rng.choice([rng.choice(WHOLE[:-1]), rng.choice(plain), rng.choice(OTHERS)])
            words[at] = str(value).replace("\0", "").encode("utf-8", "replace").decode()
        elif kind == 4:
            del words[at]
        elif kind == 5:
            words.insert(at, words[rng.randrange(len(words))])
        elif kind == 6:
            words[at] = words[at].replace("-", "_") + rng.choice(["", "x", "=", "=1"])
        elif kind == 7:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        else:
            words.append(rng.choice(["--verbose", "--no-eval-every", "-h=1", "x", "--", "---"]))
    return words
