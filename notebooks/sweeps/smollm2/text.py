"""Write a mixture of text that is available without a network: books, documentation, source code and PEPs.

`python notebooks/sweeps/smollm2/text.py OUT` writes

OUT/train/KIND.jsonl     text to train on; the text of the recipe is the directory OUT/train
OUT/held-out/KIND.jsonl  text to measure on, of the same kind, from other books, packages and PEPs
OUT/contents.json        the packages with their versions, and the documents, characters and digest of each file

The kinds are books (bundled), docs (descriptions, manuals and docstrings of the installed packages), code (their
source) and peps (bundled). The held-out text also has chat: SmolLM2-Instruct's prompt format, in which the user asks
for the docstring of a function and the assistant answers with it. A package is held out as a whole. The same packages
give the same files.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import itertools
import json
import lzma
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune.bundled import TEXTS

CHARACTERS = {"train": 4_000_000, "held-out": 200_000}
"""The maximum for each kind: a million tokens for training, and fifty thousand held out."""
LONGEST, SHORTEST = 10_000, 400
"""The length of a document in characters: longer documents are cut at a line, shorter ones are omitted."""
LONGEST_FUNCTION = 1500
"""The maximum length of a function that a conversation is about, in characters."""
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
)
PACKAGES_HELD_OUT = PEPS_HELD_OUT = 5
"""One package or PEP in this many is held out."""


def bundled(name: str) -> list[str]:
    """Return the documents of a bundled text."""
    with lzma.open(TEXTS[name], "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def digest(text: str) -> str:
    """Return the key that text is sorted by. Any order that depends only on the text would do."""
    return hashlib.sha256(text.encode()).hexdigest()


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(source: str) -> list[Documented]:
    """Return the nodes of a module that have a docstring, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the source that is parsed
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return []
    found = [node for node in ast.walk(tree) if isinstance(node, Documented) and ast.get_docstring(node)]
    return sorted(found, key=lambda node: getattr(node, "lineno", 0))


def docstrings(source: str) -> str:
    """Return all docstrings of a module, in order."""
    return "\n\n".join(ast.get_docstring(node) or "" for node in documented(source))


def conversations(source: str) -> Iterator[str]:
    """Yield a conversation about each short function of a module that has a docstring."""
    for node in documented(source):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
            docstring = ast.get_docstring(node)
            del node.body[0]
            if len(code := ast.unparse(node)) <= LONGEST_FUNCTION:
                yield CHAT.format(question=f"Write a docstring for this Python function:\n\n{code}", answer=docstring)


def read(path: Path) -> str:
    """Return the text of a file, or "" if it is not a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def documents_of(package: importlib.metadata.Distribution, kind: str) -> Iterator[str]:
    """Yield the documents of one kind (docs, code or chat) from a package."""
    files = {str(file): Path(str(file.locate())) for file in package.files or () if ".." not in file.parts}
    names = sorted(files, key=digest)
    sources = (read(files[name]) for name in names if name.endswith(".py"))
    if kind == "code":
        yield from sources
        return
    if kind == "chat":
        yield from itertools.chain.from_iterable(map(conversations, sources))
        return
    yield package.metadata.get_payload() or ""
    yield from (read(files[name]) for name in names if name.endswith((".md", ".rst")))
    yield from map(docstrings, sources)


def take_turns(streams: Iterable[Iterator[str]]) -> Iterator[str]:
    """Yield the first document of each stream, then the second of each, and so on."""
    for row in itertools.zip_longest(*streams):
        yield from (document for document in row if document)


def choose(documents: Iterable[str], characters: int) -> list[str]:
    """Return the first documents that fit into `characters`, without duplicates."""
    chosen: dict[str, None] = {}
    left = characters
    for document in documents:
        if len(document) > LONGEST:
            document = document[: document.rfind("\n", SHORTEST, LONGEST) + 1] or document[:LONGEST]
        if SHORTEST <= len(document) <= left and document not in chosen:
            chosen[document] = None
            left -= len(document)
        if left < SHORTEST:
            break
    return list(chosen)


def mixture(part: str, packages: list[importlib.metadata.Distribution]) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield each kind of text with its documents, for a part (train or held-out)."""
    held_out = part == "held-out"
    own = [p for p in packages if (int(digest(p.metadata["Name"]), 16) % PACKAGES_HELD_OUT == 0) == held_out]
    yield "books", iter(sorted(bundled("books-report" if held_out else "books-train"), key=digest))
    for kind in ("docs", "code", *(["chat"] if held_out else [])):
        yield kind, take_turns([documents_of(package, kind) for package in own])
    yield "peps", (pep for i, pep in enumerate(bundled("shifted-peps")) if (i % PEPS_HELD_OUT == 0) == held_out)


def write(out: Path, characters: dict[str, int] = CHARACTERS) -> None:
    """Write all files into a new directory."""
    out.mkdir(parents=True)
    by_name = {p.metadata["Name"]: p for p in importlib.metadata.distributions() if p.metadata["Name"] != "noln"}
    packages = [by_name[name] for name in sorted(by_name)]
    contents: dict = {"packages": {name: by_name[name].version for name in sorted(by_name)}, "files": {}}
    for part, most in characters.items():
        (out / part).mkdir()
        for kind, documents in mixture(part, packages):
            chosen = choose(documents, most)
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
            (out / part / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
            contents["files"][f"{part}/{kind}.jsonl"] = {
                "documents": len(chosen),
                "characters": sum(map(len, chosen)),
                "sha256": digest(lines),
            }
    (out / "contents.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to create")
    write(parser.parse_args().out)
