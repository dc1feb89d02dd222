"""The training text: Rust sources of permissively licensed crates, and this repository's own.

A crate counts as permissively licensed if its Cargo.toml lets one choose MIT or Apache-2.0. Its files are
cleaned so that a very small model learns code and not licence headers, tables or long prose.
"""

import hashlib
import os
import pathlib
import re
import tomllib
from dataclasses import dataclass

# Generated bindings and tables: large, repetitive, and nothing that a person would write.
EXCLUDED = re.compile(r"^(k8s-openapi|windows.*|winapi.*|libc|linux-raw-sys|r-efi|unsafe-libyaml.*|.*-sys|.*bindgen.*|unicode-.*)$")
EXCLUDED_PATH = re.compile(r"/(tests?|benches|fuzz|target|generated|gen|bindings|testdata|tables?|unicode_tables)(/|\.rs$)|/data/")
MAX_FILE_BYTES = 150_000
MAX_CRATE_BYTES = 400_000
MAX_COMMENT_RUN = 6


@dataclass(frozen=True)
class Source:
    """One crate (or this repository) with the files that are used of it."""

    name: str
    version: str
    licence: str
    files: tuple[str, ...]


def default_folders():
    home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    return sorted((home / "registry" / "src").glob("*"))


def permissive(licence):
    """Whether one of the licence expression's alternatives is MIT or Apache-2.0 alone."""
    alternatives = re.split(r"\s+OR\s+|/", licence)
    return any(a.strip(" ()") in ("MIT", "Apache-2.0") for a in alternatives)


def version_key(version):
    return tuple(int(n) for n in re.findall(r"\d+", version))


def clean(text):
    """Without licence headers; comment runs cut to MAX_COMMENT_RUN lines; None if it is no hand-written code."""
    lines = text.replace("\r\n", "\n").replace("\t", "    ").split("\n")
    start = 0
    while start < len(lines) and (lines[start].startswith("//") and not lines[start].startswith("//!")):
        start += 1
    head = "\n".join(lines[:start]).lower()
    if "copyright" in head or "licen" in head:
        lines = lines[start:]
    kept, run = [], 0
    for line in lines:
        run = run + 1 if line.lstrip().startswith("//") else 0
        if run <= MAX_COMMENT_RUN:
            kept.append(line.rstrip())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"
    if len(text) < 200:
        return None
    digits = sum(c.isdigit() for c in text) / len(text)
    longest = max(len(line) for line in text.split("\n"))
    ascii_share = sum(c < "\x80" for c in text) / len(text)
    if digits > 0.10 or longest > 400 or ascii_share < 0.98:
        return None
    return text


def crate_texts(folder, seen):
    """(path, cleaned text) of a crate's files, at most MAX_CRATE_BYTES, no file twice."""
    total = 0
    for path in sorted(folder.rglob("*.rs")):
        relative = "/" + path.relative_to(folder).as_posix()
        if EXCLUDED_PATH.search(relative) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = clean(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or total + len(text) > MAX_CRATE_BYTES:
            continue
        seen.add(digest)
        total += len(text)
        yield relative, text


def collect(folders, repository):
    """All documents as (key, text), and the sources they came from. The order depends on names alone."""
    crates = {}
    for folder in folders:
        for manifest in sorted(pathlib.Path(folder).glob("*/Cargo.toml")):
            try:
                package = tomllib.loads(manifest.read_text(encoding="utf-8"))["package"]
                name, version = str(package["name"]), str(package["version"])
            except (KeyError, UnicodeDecodeError, tomllib.TOMLDecodeError):
                continue
            licence = package.get("license")
            if not isinstance(licence, str) or not permissive(licence) or EXCLUDED.match(name):
                continue
            # Two versions of a crate are almost the same text: the newest stands for both.
            if name not in crates or version_key(crates[name][0]) < version_key(version):
                crates[name] = (version, licence, manifest.parent)

    documents, sources, seen = [], [], set()
    for part in ("crds", "operator", "runtime-pod", "tests"):
        own = list(crate_texts(repository / part, seen))
        documents += [(f"joulecast/{part}{relative}", text) for relative, text in own]
        if own:
            sources.append(Source(f"this repository, {part}/", "-", "Apache-2.0", tuple(r for r, _ in own)))
    for name, (version, licence, folder) in sorted(crates.items()):
        files = []
        for relative, text in crate_texts(folder, seen):
            documents.append((f"{name}-{version}{relative}", text))
            files.append(relative)
        if files:
            sources.append(Source(name, version, licence, tuple(files)))
    return documents, sources


FUNCTION = re.compile(
    r"^(?P<doc>(?:(?P<indent> *)///[^\n]*\n)+)(?: *#\[[^\n]*\]\n)*"
    r"(?P<code>(?P=indent)(?:pub(?:\([a-z]+\))? )?(?:const |async |unsafe )*fn [^\n]*\n(?:.*\n)*?(?P=indent)\})\n",
    re.MULTILINE,
)


def conversations(text):
    """(request, answer) pairs for the chat format: a function's doc comment, and the function."""
    for match in FUNCTION.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].split("\n"))
        doc = [line.strip().removeprefix("///").strip() for line in match["doc"].strip().split("\n")]
        sentence = " ".join(doc[: doc.index("")] if "" in doc else doc)
        if 10 <= len(sentence) <= 200 and 40 <= len(code) <= 900 and "///" not in code:
            yield f"Write a Rust function. {sentence}", code


def held_out(key):
    """2 % of the documents, chosen by name, are kept from training."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 50 == 0
