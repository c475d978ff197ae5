"""A blind preference study: two pictures by different methods, side by side with the reference (DEADiff, section 4).

A folder holds study.json, pictures under names that do not tell their method, and answers.jsonl. An answer is on disk
before it is acknowledged."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFilter

from condit.data.files import atomic_write
from condit.data.images import load_image, save_image

EVERY = 10  # one question in so many is a check
CHOICES = ("left", "right", "neither")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CHECK = "(check)"


@dataclass(frozen=True)
class Item:
    """One subject of the study: a reference and the picture of each method, by file name."""

    name: str
    reference: str | None
    pictures: Mapping[str, str]


def make_study(
    out: Path, methods: Mapping[str, Path], references: Path | None = None, *, question: str = "", seed: int = 0
) -> list[Item]:
    """Writes a study of the pictures that have the same name in the folders of all methods; references have that name
    too. Raises ValueError for fewer than two methods or no common picture, FileExistsError for an existing study."""
    if len(methods) < 2:
        raise ValueError("a study compares at least two methods: NAME=FOLDER NAME=FOLDER")
    if (out / "study.json").exists():
        raise FileExistsError(f"{out} already holds a study; choose another folder")
    named = {name: pictures_of(folder) for name, folder in methods.items()}
    common = sorted(set.intersection(*(set(files) for files in named.values())))
    if not common:
        raise ValueError(f"no picture has the same name in all of {', '.join(map(str, methods.values()))}")
    shown = {} if references is None else pictures_of(references)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    secret, items = secrets.token_hex(16), []

    def copied(path: Path, what: str, blurred: bool = False) -> str:
        name = f"{hmac.new(secret.encode(), what.encode(), hashlib.sha256).hexdigest()[:20]}.png"
        image = load_image(path)
        save_image(spoilt(image) if blurred else image, out / "pictures" / name)
        return name

    for name in common:
        pictures = {method: copied(files[name], f"{method}/{name}") for method, files in named.items()}
        first = next(iter(named.values()))[name]
        pictures[CHECK] = copied(first, f"{CHECK}/{name}", blurred=True)
        reference = copied(shown[name], f"reference/{name}") if name in shown else None
        items.append(Item(name, reference, pictures))
    content = {"format": 1, "secret": secret, "seed": seed, "question": question, "methods": list(methods)}
    content["items"] = [vars(item) for item in items]
    atomic_write(out / "study.json", lambda path: path.write_text(json.dumps(content, indent=1), encoding="utf-8"))
    return items


def pictures_of(folder: Path) -> dict[str, Path]:
    """Stem -> path of the images in a folder. Raises ValueError for a folder that does not exist."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}


def spoilt(image: Image.Image) -> Image.Image:
    """A picture that nobody who looks prefers to the original."""
    small = image.resize((max(image.width // 10, 1), max(image.height // 10, 1)))
    return small.resize(image.size).filter(ImageFilter.GaussianBlur(max(image.size) / 30))


class Study:
    """An opened study. Answers survive a crash: one line each, written at once and synchronised before `answer`
    returns; a line that a power cut left incomplete was never acknowledged, and is cut off."""

    def __init__(self, folder: Path) -> None:
        file = folder / "study.json"
        if not file.is_file():
            raise FileNotFoundError(f"no study in {folder}; make one with `condit study make`")
        content = json.loads(file.read_text(encoding="utf-8"))
        self.folder, self.secret, self.seed = folder, str(content["secret"]).encode(), int(content["seed"])
        self.question, self.methods = str(content["question"]), list(content["methods"])
        self.items = [Item(**item) for item in content["items"]]
        names = {name for item in self.items for name in (*item.pictures.values(), item.reference) if name}
        self.pictures = {name: (folder / "pictures" / name).read_bytes() for name in sorted(names)}
        self.lock, self.path = threading.Lock(), folder / "answers.jsonl"
        self.answers = recovered(self.path)
        self.known = {str(answer["ticket"]): answer for answer in self.answers}

    def next(self, rater: str) -> dict[str, object]:
        """The next question for a rater: those pairs first that have the fewest answers, the rater's own counting more.
        Sides and order are shuffled."""
        with self.lock:
            mine = [answer for answer in self.answers if answer["rater"] == rater]
            chance = random.Random(f"{self.seed}/{rater}/{len(mine)}")
            check = len(mine) % EVERY == EVERY // 2
            if check:
                item = chance.choice(self.items)
                pair = [self.methods[0], CHECK]
            else:
                counts = Counter(key_of(answer) for answer in self.answers)
                own = Counter(key_of(answer) for answer in mine)
                questions = [
                    (item, [a, b])
                    for item in self.items
                    for i, a in enumerate(self.methods)
                    for b in self.methods[i + 1 :]
                ]
                chance.shuffle(questions)
                item, pair = min(questions, key=lambda q: (own[key(q[0].name, q[1])], counts[key(q[0].name, q[1])]))
            chance.shuffle(pair)
        asked = {"rater": rater, "item": item.name, "left": pair[0], "right": pair[1], "n": len(mine)}
        return {
            "ticket": self.signed(asked),
            "left": item.pictures[pair[0]],
            "right": item.pictures[pair[1]],
            "reference": item.reference,
            "question": self.question,
            "answered": len(mine),
        }

    def signed(self, asked: Mapping[str, object]) -> str:
        """A question as text that a client cannot read or change: the methods stay secret until the report."""
        text = json.dumps(asked, ensure_ascii=False).encode()
        nonce = hmac.new(self.secret, text, hashlib.sha256).digest()[:16]
        return (nonce + self.masked(text, nonce)).hex()

    def masked(self, text: bytes, nonce: bytes) -> bytes:
        """XOR with a stream that the secret and the nonce give."""
        stream = b"".join(
            hmac.new(self.secret, nonce + bytes([i >> 8, i & 255]), hashlib.sha256).digest()
            for i in range(len(text) // 32 + 1)
        )
        return bytes(a ^ b for a, b in zip(text, stream, strict=False))

    def asked(self, ticket: str) -> dict[str, object]:
        """The question of a ticket. Raises ValueError for one that this study did not give."""
        try:
            data = bytes.fromhex(ticket)
        except ValueError:
            data = b""
        text = self.masked(data[16:], data[:16])
        if len(data) < 18 or not hmac.compare_digest(
            hmac.new(self.secret, text, hashlib.sha256).digest()[:16], data[:16]
        ):
            raise ValueError("this ticket is not one of this study; reload the page")
        return json.loads(text)

    def answer(self, ticket: str, choice: str, seconds: float) -> int:
        """Stores an answer and returns how many the rater has given; the same ticket counts once. Raises ValueError for
        an unknown ticket or choice, OSError where the disk takes nothing."""
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {', '.join(CHOICES)}; found {choice!r}")
        record = {**self.asked(ticket), "choice": choice, "seconds": round(seconds, 2)}
        record |= {"time": int(time.time()), "ticket": ticket[:32]}
        with self.lock:
            if record["ticket"] not in self.known:
                append(self.path, record)
                self.known[str(record["ticket"])] = record
                self.answers.append(record)
            return sum(answer["rater"] == record["rater"] for answer in self.answers)


def key(item: str, pair: Sequence[str]) -> tuple[str, ...]:
    """A question without its sides."""
    return (item, *sorted(pair))


def key_of(answer: Mapping[str, object]) -> tuple[str, ...]:
    return key(str(answer["item"]), [str(answer["left"]), str(answer["right"])])


def append(path: Path, record: Mapping[str, object]) -> None:
    """Adds one line and waits until it is on disk. A failure leaves the file as it was."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(f"{path}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if new:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def recovered(path: Path) -> list[dict[str, object]]:
    """The answers of a file. Its last line, if it is incomplete, is removed. Raises ValueError for another broken
    line."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    answers = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            answers.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}, is not valid JSON; move it out of the file") from None
    return answers
