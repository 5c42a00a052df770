"""Hygiene of the notebooks, which are read here and not run.

Every check is itself tested: a small good notebook must pass it, and a bad one must be refused.
"""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
READMES = sorted(path for end in ("", "[!.]*/", "checkpoints/*/") for path in ROOT.glob(f"{end}README.md"))
TAGS = {"nbval-ignore-output", "same-as-package"}  # the latter: a test compares the cell with the package
MEGABYTE = 1_000_000
STRICT_SHARE = 2 / 3
FORBIDDEN = {
    r"# *NBVAL_": "nbval overlooks such comments at the end of a line: use tags",
    r";[ \t]*$": "nbval does not honour a `;` at the end of a line",
    r"\bif ci\b": "a notebook does not ask whether it is tested",
    r"^%%?time": "timings differ from run to run",
}
# /content and /home/ec2-user are where Colab and SageMaker keep files.
MACHINE_PATH = r"(?<![\w./])/(root|work|opt|mnt|Users|home(?!/(?:ec2|sagemaker)-user))\b|\.\./shared|\b[A-Z]:\\"
TEMPORARY_PATH = r"(?<![\w./])/(tmp|var)/"


def read(path: Path):
    # Not `nbformat.read`, which mends what is wrong.
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def texts(output) -> list[str]:
    """What a reader sees of an output as text; not the bytes of a picture."""
    data = output.get("data", {})
    shown = [value for kind, value in data.items() if kind.startswith("text/") or kind == "image/svg+xml"]
    return [output.get("text", ""), *map(str, shown), *output.get("traceback", [])]


def prints_text(cell) -> bool:
    """Whether a cell shows text other than the `<Figure ...>` that stands in for a picture."""
    return any(
        output.output_type == "stream" or ("data" in output and not any(k.startswith("image/") for k in output.data))
        for output in cell.outputs
    )


# ---- checks: each yields what is wrong with the notebook called `name` ----
def check_format(name, notebook):
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield f"is in format {notebook.nbformat}.{notebook.nbformat_minor}, not 4.5"
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) != len(ids):
        yield "has a cell without an id, or two of one id"
        return
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"is not valid: {str(error).splitlines()[0]}"


def check_metadata(name, notebook):
    metadata = notebook.metadata
    if metadata.get("kernelspec", {}).get("name") != "python3":
        yield "names a kernel other than python3"
    if metadata.get("accelerator") != "GPU":
        yield "does not ask Colab for a GPU"
    if "widgets" in metadata:
        yield "has metadata.widgets, which GitHub refuses to show"
    for cell in notebook.cells:
        if "execution" in cell.metadata:
            yield "holds the times at which cells ran"
        if unknown := set(tags(cell)) - TAGS:
            yield f"has the unknown tag {unknown}"


def check_outputs(name, notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    if not counts or counts != list(range(1, len(counts) + 1)):
        yield f"was not run from top to bottom in a fresh kernel: {counts}"
    for cell in code(notebook):
        if not cell.outputs and re.search(r"^(print\(|plt\.show\(\))", cell.source, re.MULTILINE):
            yield f"lacks the output of {cell.source[:60]!r}"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"holds the error {output.ename}"
            if output.get("name") == "stderr":
                yield f"holds stderr output: {output.text[:60]!r}"
            if len(json.dumps(output)) > MEGABYTE:
                yield f"has an output above 1 MB, of {cell.source[:60]!r}"
    if len(nbformat.writes(notebook)) > 2 * MEGABYTE:
        yield "is above 2 MB"


def check_paths(name, notebook):
    for cell in notebook.cells:
        if found := re.search(MACHINE_PATH, cell.source):
            yield f"names a path of one machine: {found[0]}"
        shown = "\n".join(text for output in cell.get("outputs", []) for text in texts(output))
        if found := re.search(f"{MACHINE_PATH}|{TEMPORARY_PATH}", shown):
            yield f"shows a path of one machine: {found[0]}"


def check_code(name, notebook):
    for cell in code(notebook):
        for pattern, reason in FORBIDDEN.items():
            if re.search(pattern, cell.source, re.MULTILINE):
                yield f"{reason}: {cell.source[:60]!r}"
        if not cell.source.strip():
            yield "has an empty cell"


def check_strictness(name, notebook):
    printing = [cell for cell in code(notebook)[2:] if prints_text(cell)]  # set-up and settings do not count
    strict = [cell for cell in printing if "nbval-ignore-output" not in tags(cell)]
    if len(strict) < STRICT_SHARE * len(printing):
        yield f"compares only {len(strict)} of {len(printing)} cells that print text"


def check_beginning(name, notebook):
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith(f"# {name[:2]} "):
        yield f"does not start with the title `# {name[:2]} ...`"
    for path in NOTEBOOKS:
        if abs(int(path.name[:2]) - int(name[:2])) == 1 and f"({path.name})" not in first.source:
            yield f"does not link to its neighbour {path.name} at the top"


def check_end(name, notebook):
    text = "\n\n".join(markdown(notebook))
    if [title.strip() for title in re.findall(r"^## (.+)$", text, re.MULTILINE)][-2:] != ["Summary", "Exercises"]:
        yield "does not end with the sections Summary and Exercises"
    exercises = text.rpartition("\n## Exercises")[2]
    folded = re.findall(r"<details>\s*<summary>[^\n]+</summary>\n\n.+?</details>", exercises, re.DOTALL)
    if len(folded) < 3:
        yield f"has {len(folded)} folded solutions (a blank line after </summary> is needed), not at least 3"
    if not len(folded) == exercises.count("<details") == exercises.count("</details>"):
        yield "has a <details> that is malformed or not closed"


def check_links(name, notebook):
    yield from broken_links("\n\n".join(markdown(notebook)), ROOT / "notebooks" / name)


CHECKS = [
    check_format, check_metadata, check_outputs, check_paths, check_code, check_strictness, check_beginning, check_end,
    check_links,
]  # fmt: skip


# ---- links ----
def prose(text: str) -> str:
    """Markdown without code and formulas, in which brackets mean something else."""
    for pattern in (r"^```.*?^```", r"`[^`\n]+`", r"\$\$.+?\$\$", r"\$[^$\n]+\$"):
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    return text


def anchors(text: str, github: bool) -> set[str]:
    """Where links into a page may point: GitHub's rule for Markdown files, Jupyter's (it keeps case) for notebooks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()) if github else heading
        slug = slug.replace(" ", "-")
        number = sum(slug == old or re.fullmatch(re.escape(slug) + r"-\d+", old) is not None for old in found)
        found.add(f"{slug}-{number}" if github and number else slug)
    return found


def broken_links(text: str, source: Path):
    """What is wrong with the links of a Markdown text that stands in the file `source`; the network is not asked."""
    pattern = r"\[(?:[^\[\]]|\[[^\]]*\]\([^)]*\))*\]\(<?([^()\s>]*(?:\([^()\s]*\))?)>?[^)]*\)|(?:src|href)=\"([^\"]+)\""
    inner = r"!\[[^\]]*\]\(([^()\s]+)\)"  # a picture that is itself a link
    targets = [a or b for a, b in re.findall(pattern, prose(text))] + re.findall(inner, prose(text))
    for target in targets:
        if re.match(r"(https?|mailto|data|attachment):", target):
            continue
        address, _, anchor = target.partition("#")
        path = (source.parent / address).resolve() if address else source
        if address and (not path.exists() or not path.is_relative_to(ROOT)):
            yield f"links to {target}, which is not there"
        elif anchor:
            inside = text if not address else page(path)
            if anchor not in anchors(inside, github=path.suffix == ".md"):
                yield f"links to {target}, but there is no such heading"


def page(path: Path) -> str:
    """The Markdown of a notebook or of a Markdown file."""
    return "\n\n".join(markdown(read(path))) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


# ---- the checks at work ----
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path, check):
    assert list(check(path.name, read(path))) == []


def test_every_notebook_has_a_number_of_its_own():
    numbers = [path.name[:3] for path in NOTEBOOKS]
    assert sorted(numbers) == [f"{number:02d}_" for number in range(8)]


def differing(notebooks: dict) -> list[str]:
    """Names of notebooks whose set-up or settings cell is not that of the first."""
    common = {name: [(cell.source, tags(cell)) for cell in code(notebook)[:2]] for name, notebook in notebooks.items()}
    return [name for name, cells in common.items() if cells != next(iter(common.values()))]


def test_set_up_and_settings_are_the_same_everywhere():
    assert differing({path.name: read(path) for path in NOTEBOOKS}) == []


def test_set_up_installs_what_the_package_needs_and_no_more():
    marker = "# The notebooks."
    assert all(f'split("{marker}")[0]' in code(read(path))[0].source for path in NOTEBOOKS)
    above, _, below = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition(marker)
    assert all(f"\n{name}>" in above for name in ("torch", "numpy", "segmentation-models-pytorch", "tensorboard"))
    assert all(f"\n{name}>" in below and name not in above for name in ("jupyterlab", "pytest", "monai"))


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_markdown_files(path):
    assert list(broken_links(path.read_text(encoding="utf-8"), path)) == []


# ---- the checks themselves ----
def make_good_notebook():
    """The smallest notebook that every check accepts, called GOOD."""
    printed = new_output("stream", name="stdout", text="2\n")
    picture = new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure size 640x480 with 1 Axes>"})
    solutions = "<details><summary>Solution</summary>\n\nTwo.\n\n</details>\n\n" * 3
    neighbours = " ".join(f"[to]({path.name})" for path in NOTEBOOKS)
    cells = [
        new_markdown_cell(f"# {GOOD[:2]} Good\n\n{neighbours} [below](#What-is-1-+-1?) [README](../README.md)"),
        new_code_cell("import os", execution_count=1),
        new_code_cell("print(1 + 1)", execution_count=2, outputs=[printed]),
        new_markdown_cell("## What is 1 + 1?\n\n`[no](link)` [out](https://example.org) $a[1](2)$"),
        new_code_cell("print(1 + 1)", execution_count=3, outputs=[printed]),
        new_code_cell("print(1 + 1)", execution_count=4, outputs=[printed]),
        new_code_cell("plt.show()", execution_count=5, outputs=[picture]),
        new_code_cell("print(now)", execution_count=6, outputs=[printed], metadata={"tags": ["nbval-ignore-output"]}),
        new_markdown_cell("## Summary\n\n- Two."),
        new_markdown_cell(f"## Exercises\n\n1. What?\n\n{solutions}"),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "accelerator": "GPU"}
    return copy.deepcopy(new_notebook(cells=cells, metadata=metadata))


GOOD = NOTEBOOKS[0].name if NOTEBOOKS else "00_start_here.ipynb"


def change(number, **values):
    """A change to one cell."""
    return lambda notebook: notebook.cells[number].update(values)


def add_output(kind, **values):
    return lambda notebook: notebook.cells[4].outputs.append(new_output(kind, **values))


def add_text(text):
    return add_output("stream", name="stdout", text=text)


def replace(number, old, new):
    def apply(notebook):
        assert old in notebook.cells[number].source
        notebook.cells[number].source = notebook.cells[number].source.replace(old, new)

    return apply


def ignore_all_outputs(notebook):
    for cell in code(notebook):
        cell.metadata["tags"] = ["nbval-ignore-output"]


def strip(notebook):
    for cell in code(notebook):
        cell.update(execution_count=None, outputs=[])


def fill(notebook):
    for cell in code(notebook)[1:4]:
        cell.outputs = [new_output("stream", name="stdout", text="x" * 900_000)]


SPOILED = [
    (check_format, lambda notebook: notebook.update(nbformat_minor=4)),
    (check_format, change(1, id="same")),
    (check_format, lambda notebook: notebook.cells[1].pop("id")),
    (check_format, lambda notebook: notebook.cells[1].pop("outputs")),
    (check_metadata, lambda notebook: notebook.metadata.kernelspec.update(name="conda_pytorch")),
    (check_metadata, lambda notebook: notebook.metadata.pop("kernelspec")),
    (check_metadata, lambda notebook: notebook.metadata.pop("accelerator")),
    (check_metadata, lambda notebook: notebook.metadata.update(widgets={})),
    (check_metadata, lambda notebook: notebook.cells[4].metadata.update(execution={"iopub.status.busy": "now"})),
    (check_metadata, lambda notebook: notebook.cells[4].metadata.update(tags=["nbval-skip"])),
    (check_outputs, strip),
    (check_outputs, change(4, outputs=[])),
    (check_outputs, change(6, outputs=[])),
    (check_outputs, change(4, execution_count=None)),
    (check_outputs, change(4, execution_count=9)),
    (check_outputs, lambda notebook: notebook.cells.insert(1, notebook.cells.pop(2))),
    (check_outputs, add_output("error", ename="ValueError", evalue="", traceback=[])),
    (check_outputs, add_output("stream", name="stderr", text="UserWarning")),
    (check_outputs, add_output("display_data", data={"image/png": "A" * 1_100_000})),
    (check_outputs, fill),
    (check_paths, replace(3, "## What", "/opt/data ## What")),
    (check_paths, replace(4, "1 + 1", '"/mnt/data"')),
    (check_paths, replace(4, "1 + 1", '"/opt/series"')),
    (check_paths, add_text("saved in /home/anna/x.png")),
    (check_paths, add_text("saved in /tmp/abc/x.png")),
    (check_paths, add_output("execute_result", data={"text/plain": "PosixPath('/Users/anna')"}, execution_count=3)),
    (check_code, replace(4, "1)", "1)  # NBVAL_IGNORE_OUTPUT")),
    (check_code, replace(4, "1)", "1);")),
    (check_code, replace(4, "print", "if ci:\n    print")),
    (check_code, replace(4, "print", "%%time\nprint")),
    (check_code, change(1, source=" \n")),
    (check_strictness, ignore_all_outputs),
    (check_strictness, lambda notebook: notebook.cells[4].metadata.update(tags=["nbval-ignore-output"])),
    (check_beginning, lambda notebook: notebook.cells.pop(0)),
    (check_beginning, replace(0, "# 0", "# 7")),
    (check_beginning, replace(0, ".ipynb)", ".md)")),
    (check_end, lambda notebook: notebook.cells.pop(8)),
    (check_end, lambda notebook: notebook.cells.append(new_markdown_cell("## Afterthought"))),
    (check_end, replace(9, "</details>\n\n<details>", "")),
    (check_end, replace(9, "</summary>\n\n", "</summary>\n")),
    (check_end, lambda notebook: notebook.cells.append(new_markdown_cell("<details>"))),
    (check_links, replace(0, "../README.md", "../README.txt")),
    (check_links, replace(0, "../README.md", "../../outside.md")),
    (check_links, replace(0, "#What-is", "#what-is")),
    (check_links, replace(3, "## What", "![picture](../media/missing.png)\n\n## What")),
    (check_links, replace(3, "## What", '<img src="../media/missing.png">\n\n## What')),
    (check_links, replace(3, "## What", "[![picture](missing.png)](https://example.org)\n\n## What")),
    (check_links, replace(3, "## What", f"[there]({GOOD}#Nowhere)\n\n## What")),
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_good_notebook_is_accepted(check):
    assert list(check(GOOD, make_good_notebook())) == []


@pytest.mark.parametrize("number", range(len(SPOILED)), ids=lambda number: f"{SPOILED[number][0].__name__}-{number}")
def test_a_bad_notebook_is_refused(number, tmp_path):
    check, spoil = SPOILED[number]
    notebook = make_good_notebook()
    notebook.cells[2].id = "same"
    spoil(notebook)
    (tmp_path / GOOD).write_text(json.dumps(notebook), encoding="utf-8")
    assert list(check(GOOD, read(tmp_path / GOOD)))


def test_every_check_is_itself_tested():
    assert {check for check, _ in SPOILED} == set(CHECKS)


@pytest.mark.parametrize("number", [1, 2])
def test_another_set_up_or_settings_cell_is_noticed(number):
    other = make_good_notebook()
    assert differing({"a": make_good_notebook(), "b": other}) == []
    other.cells[number].source += " "
    assert differing({"a": make_good_notebook(), "b": other}) == ["b"]


def test_anchors_follow_the_rules_of_github_and_jupyter():
    text = "# A `b`, c & D!\n## Twice\n## Twice\n```\n# not one\n```\n"
    assert anchors(text, github=True) == {"a-b-c--d", "twice", "twice-1"}
    assert anchors(text, github=False) == {"A-b,-c-&-D!", "Twice"}
