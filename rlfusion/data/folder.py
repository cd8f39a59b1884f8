"""A folder of images: classes by sub-folder, captions beside the images or in a metadata table, splits by name."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.data import splits
from rlfusion.data.columns import Columns, read_table, read_text, roles, split_of
from rlfusion.data.dataset import Dataset
from rlfusion.data.files import METADATA, Files, files_below, require_regular
from rlfusion.data.rows import Found, Row, Source, assemble, caption_text, plain
from rlfusion.data.table import located, text_of

BOX = re.compile(r"\d+(\s+[-+.\deE]+){4,}\s*")
"""A line of a detector's label file: class and coordinates."""


@dataclass(frozen=True)
class Folder(Source):
    """Every image below a folder is a sample.

    Attributes:
        image: the column of a metadata table that names the files; "" finds it by its name.
        caption: the column of its captions; "" finds it by its name.
        label: the column of its classes; "" finds it by its name, where there is no caption.
        lines: of caption files: "one" refuses several lines, "first" takes the first, "join" joins them by spaces.
    """

    image: str = ""
    caption: str = ""
    label: str = ""
    lines: Literal["one", "first", "join"] = "one"

    def load(self, size: int) -> Dataset:
        """
        Raises:
            ConfigError: no folder or no image in it; an image or a text that cannot be used (named); a layout that can
                be understood in two ways.
        """
        root = Path(self.path)
        if not root.is_dir():
            raise ConfigError(f"data folder {self.path!r} does not exist")
        files = files_below(root)
        if not files.images:
            raise ConfigError(f"data folder {self.path!r} holds no image{_instead(files)}")
        top = Counter(_top(file, root) for file in files.images)
        where = f"data folder {self.path!r}"
        parts = splits.choose(top, self.split, self.held, where)
        if self.split != splits.NONE:
            splits.require_no_hidden(_below(files.images, root, parts), where)
        wanted = [f for f in files.images if parts is None or _top(f, root) in parts]
        kind, texts, note = self._texts(files, wanted, root if parts is None else None)
        rows = [Row(f, f"image {str(f)!r}", _top(f, root) if parts else "", texts.get(f, "")) for f in files.images]
        return assemble(self, Found(rows, kind, files.left, [note] if note else []), parts, size)

    def _texts(self, files: Files, wanted: list[Path], root: Path | None) -> tuple[str, dict[Path, str], str]:
        """("captions", "classes" or "none"), the text of each image, and what the line is to say of it."""
        asked = self.conditions
        columns = any((self.image, self.caption, self.label))
        beside = [f for f in wanted if f in files.captions]
        if asked != "none":
            if columns and not files.metadata:
                raise ConfigError(f"columns are named, and {self.path!r} has none of {', '.join(sorted(METADATA))}")
            if files.metadata and (asked == "auto" or columns or (asked == "captions" and not beside)):
                return self._of_tables(files, wanted, root)
        for file in files.metadata if self.split != splits.NONE else ():
            self._split_column(read_table(file), root)  # tables that are not read for texts may have one too
        if asked == "none":
            return "none", {}, ""
        if asked == "captions" or (asked == "auto" and beside):
            return "captions", self._beside(files, wanted, len(beside)), "captions from files beside the images"
        if files.captions:
            files.left["caption files"] += len(set(files.captions.values()))
        return self._of_folders(wanted, root)

    def _beside(self, files: Files, wanted: list[Path], count: int) -> dict[Path, str]:
        if count < len(wanted):
            bare = next(f for f in wanted if f not in files.captions)
            raise ConfigError(
                f"{count} of {len(wanted)} images have a caption file of their name beside them, {str(bare)!r} has "
                "none: expected one for every image, or conditions='classes' or 'none'"
            )
        read: dict[Path, str] = {}
        for file in {files.captions[f] for f in wanted}:
            read[file] = self._caption(file)
        return {f: read[files.captions[f]] for f in wanted}

    def _caption(self, file: Path) -> str:
        require_regular(file, "caption")
        lines = [text.strip() for text in read_text(file).splitlines() if text.strip()]
        if any(BOX.fullmatch(text) for text in lines):
            raise ConfigError(f"{str(file)!r} holds numbers, {lines[0][:40]!r}, as of boxes: expected a caption")
        if len(lines) > 1 and self.lines == "one":
            raise ConfigError(f"{str(file)!r} has {len(lines)} lines: expected one caption, or lines='first' or 'join'")
        return caption_text(lines[0] if self.lines == "first" and lines else " ".join(lines), repr(str(file)))

    def _of_folders(self, wanted: list[Path], root: Path | None) -> tuple[str, dict[Path, str], str]:
        """The first folder below the root, or below the split."""
        base = Path(self.path)
        below = {f: f.relative_to(base).parts[(0 if root else 1) : -1] for f in wanted}
        bare = [f for f, names in below.items() if not names]
        if bare and len(bare) < len(wanted):
            raise ConfigError(
                f"{len(bare)} of {len(wanted)} images lie outside of the folders of the classes, such as "
                f"{str(bare[0])!r}: expected all inside or none, or conditions='none'"
            )
        if bare:
            return "classes", dict.fromkeys(wanted, "all"), ""
        return "classes", {f: plain(names[0], f"folder {names[0]!r}") for f, names in below.items()}, ""

    def _of_tables(self, files: Files, wanted: list[Path], root: Path | None) -> tuple[str, dict[Path, str], str]:
        """From the metadata tables, of which each names the images below its own folder."""
        texts: dict[Path, str] = {}
        kinds = set()
        for file in files.metadata:
            kind = self._of_table(file, texts, root)
            kinds.add(kind)
        if len(kinds) > 1:
            raise ConfigError(f"the metadata tables of {self.path!r} hold {' and '.join(sorted(kinds))}: expected one")
        bare = [f for f in wanted if f not in texts]
        if bare:
            named = [str(f) for f in texts]
            raise unknown(f"image of {str(files.metadata[0])!r} ({len(bare)} have no row),", str(bare[0]), named[:1000])
        kind, tables = kinds.pop(), ", ".join(sorted({f.name for f in files.metadata}))
        notes = [f"{kind} from {tables}"] if kind != "none" else []
        if elsewhere := len(texts.keys() - set(files.images)):
            notes.append(f"{elsewhere:,} rows of images that are hidden, elsewhere, or of another suffix left out")
        return kind, texts, "; ".join(notes)

    def _of_table(self, file: Path, texts: dict[Path, str], root: Path | None) -> str:
        table = read_table(file)
        column = self._split_column(table, root)
        role = roles(table, self.conditions, self.image, self.caption, self.label)
        for i, row in enumerate(table.rows):
            where = table.where(i)
            image, _ = located(row.get(role.image), file.parent, "", where)
            if not isinstance(image, Path):
                raise ConfigError(f"{where} holds its image: expected its file's name, or --data {str(file)!r}")
            if image in texts:
                raise ConfigError(f"{where} is the second of {str(image)!r}: expected one, or --data {str(file)!r}")
            if column and row.get(column) != _top(image, Path(self.path)):
                raise ConfigError(f"{where}: {column} = {row.get(column)!r} of {str(image)!r}: expected the same split")
            texts[image] = text_of(row, role.text, role.kind, where)
        return role.kind

    def _split_column(self, table: Columns, root: Path | None) -> str:
        """The column of the splits in a table of metadata, "" for none.

        Raises:
            ConfigError: there is one, and the folder has no splits (``root`` is given).
        """
        column = "" if self.split == splits.NONE else split_of(table)
        if column and root is not None:
            raise ConfigError(
                f"{str(table.file)!r} has a column {column!r}, and a folder's splits are its folders: expected --data "
                f"{str(table.file)!r}, which follows it, or split='none'"
            )
        return column


def _top(file: Path, root: Path) -> str:
    """The first folder below ``root`` on the way to ``file``; "" for none, and for a file elsewhere."""
    parts = file.relative_to(root).parts if file.is_relative_to(root) else ()
    return parts[0] if len(parts) > 1 else ""


def _below(images: list[Path], root: Path, parts: splits.Parts | None) -> dict[str, set[str]]:
    """The names of the folders below each folder, deeper than the splits themselves."""
    found: dict[str, set[str]] = {}
    for folder in {file.parent for file in images}:
        names = folder.relative_to(root).parts
        for depth in range(1, len(names)):
            if not parts or names[0] in parts:
                found.setdefault("/".join(names[:depth]), set()).add(names[depth])
    return found


def _instead(files: Files) -> str:
    """What lies there that another source reads."""
    for suffix, hint in ((".parquet", "hf(path='...')"), (".npz", "the .npz itself")):
        if suffix in files.left:
            return f", but {files.left[suffix]} {suffix}: expected {hint}"
    left = ", ".join(f"{n} {why}" for why, n in files.left.most_common(4))
    return f" (it has {left}): expected files such as .png, .jpg, .webp, .tif" if left else ": it is empty"


def folder(path: Path, size: int) -> Dataset:
    """Images below ``path``, as ``Folder`` by its defaults."""
    return Folder(str(path)).load(size)
