"""Text as documents of sentences: the standard library's documentation, procedural stories, the user's files."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.readers import read_documents
from ..demo.corpus import source_files
from ..errors import UserError

SHORTEST, LONGEST = 20, 400  # characters of a sentence that is kept
FEWEST = 6  # sentences of a document that is kept: a context of five and a target
NAMES = re.findall(
    r"\w+",
    """
Ada Ben Cleo Dario Esme Farid Greta Hugo Ines Jonas Kaya Leo Mina Nils Olga Pablo Quinn Rosa Sami Tilda Uma
Viktor Wanda Xaver Yuki Zora Alma Bruno Carla Dimitri Elif Fiona Goran Hana Igor Jana Kofi Lena Marco Nora
Oskar Petra Raul Selma Tomas Ulla Vera Willem
""",
)
PLACES = (
    """
the harbor, the old mill, the library, the market, the mountain village, the night train, the lighthouse, the
bakery, the railway station, the botanical garden, the castle, the hospital, the fire station, the vineyard,
the cinema, the monastery, the swimming pool, the post office, the observatory, the shipyard, the school, the
town hall, the circus, the airport, the forest camp, the museum, the theater, the quarry, the island, the
bridge, the hotel, the farm, the ferry, the stadium, the embassy, the zoo, the tailor's shop, the boathouse,
the brewery, the courthouse, the printing house, the orchard, the ski lodge, the pharmacy, the glass works,
the pottery, the weather station, the dance hall
""".replace("\n", " ")
    .strip()
    .split(", ")
)
SCRIPTS = (
    "{n} woke up early at {p}. Outside it was still dark and cold. {n} put the kettle on the stove. Soon the "
    "smell of tea filled the room at {p}. {n} read yesterday's letter again. It said that a visitor would come to "
    "{p}. {n} swept the floor twice. At noon somebody knocked on the door at {p}.",
    "A small dog followed {n} to {p}. It had no collar and a torn ear. {n} gave it half a sandwich. The dog slept "
    "on {n}'s coat at {p}. Nobody at {p} knew the animal. {n} asked every shopkeeper in turn. In the evening a "
    "girl ran towards {n}. She had looked for her dog all over {p}.",
    "{n} wanted to fix the clock at {p}. It had not moved for eleven years. {n} opened the case with a butter "
    "knife. Dust and a dead moth fell out. One of the wheels at {p} had lost a tooth. {n} carved a new one from "
    "hard wood. The pendulum swung again under {n}'s hands. That night everyone at {p} heard it strike nine.",
    "Rain began to fall when {n} reached {p}. Water ran through the roof in four places. {n} collected buckets "
    "from the neighbors. The drops at {p} sounded like a slow song. {n} climbed up with a rope and a tarp. The "
    "wind nearly took the tarp away from {n}. Two strangers held the ladder at {p}. By morning the floor at {p} "
    "was dry.",
    "{n} lost a ring somewhere near {p}. It had belonged to a grandmother. {n} searched the grass on hands and "
    "knees. A boy lent {n} his metal detector. They found nails, a spoon and an old coin at {p}. The coin turned "
    "out to be worth a lot. {n} forgot about the ring for a while. Weeks later a baker at {p} found it in the "
    "flour.",
    "The choir met on Thursdays at {p}. {n} sang so quietly that nobody heard it. One evening the soloist at {p} "
    "fell ill. The conductor looked straight at {n}. {n} stepped forward with shaking knees. The first note "
    "filled all of {p}. After the concert people waited for {n}. From then on {n} stood in the first row at {p}.",
    "{n} planned to sail away from {p}. The boat was painted green and leaked. {n} bought rope, biscuits and a "
    "compass. Friends laughed and brought presents to {p}. The first storm came after two days. {n} tied "
    "everything down and waited. A cargo ship answered the call of {n}. It brought {n} back to {p} with a better "
    "map.",
    "{n} taught a class of nine children at {p}. They wanted to know why the moon changes. {n} used a lamp and an "
    "orange. The children at {p} made shadows with their hands. One of them asked {n} about the dark side. {n} "
    "did not know and said so. Together they looked it up at {p}. Now the class at {p} keeps a diary of the moon.",
)
KINDS = ("stdlib", "stories")


def documents_of(source: str) -> list[list[str]]:
    """Return documents, each a list of its sentences in order.

    Args:
        source: "stdlib", "stories", or a file or directory that `--data` reads.

    Raises:
        UserError: it cannot be read, holds no text, or no document has `FEWEST` sentences.
    """
    found = {"stdlib": _stdlib, "stories": _stories}.get(source, lambda: _files(source))()
    kept = [document for document in found if len(document) >= FEWEST]
    if not kept:
        raise UserError(
            f"{source} has no document of {FEWEST} sentences of {SHORTEST} to {LONGEST} characters",
            f"give longer texts, or one of {', '.join(KINDS)}",
        )
    return kept


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; pieces shorter or longer than what is kept are dropped."""
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        pieces += re.split(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])", joined)
    return [piece for piece in pieces if SHORTEST <= len(piece) <= LONGEST]


def _stories() -> list[list[str]]:
    """Return a document for each name and its place: all scripts, one after the other in an order of its own.

    So a document that validates is of a name and a place that training has not seen.
    """
    draw = random.Random(0)
    documents = []
    for name, place in zip(NAMES, PLACES, strict=True):
        scripts = draw.sample(SCRIPTS, len(SCRIPTS))
        documents.append([one for script in scripts for one in sentences(script.format(n=name, p=place))])
    return documents


def _stdlib() -> list[list[str]]:
    """Return the documentation strings of each module of this Python's standard library."""
    documents = []
    for path in source_files(Path(sysconfig.get_path("stdlib"))):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):  # a few sources declare another encoding on purpose
            continue
        documents.append([sentence for text in _docstrings(tree) for sentence in sentences(text)])
    return documents


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _files(source: str) -> list[list[str]]:
    texts = [document.text for document in read_documents(source)]
    return [sentences(text) for text in texts if text is not None]


def flat(documents: Sequence[Sequence[str]], limit: int | None = None) -> tuple[list[str], list[int]]:
    """Return all sentences and the number of each one's document; at most `limit`, in whole documents.

    The first document is kept whatever its length.
    """
    texts: list[str] = []
    numbers: list[int] = []
    for number, document in enumerate(documents):
        if limit is not None and texts and len(texts) + len(document) > limit:
            break
        texts += document
        numbers += [number] * len(document)
    return texts, numbers
