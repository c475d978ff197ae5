"""docs/cli.md from the commands: `python tests/cli_page.py` writes it, tests/unit/test_docs.py compares it."""

import re
from collections.abc import Iterator
from pathlib import Path

import typer

from condit.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Command line

Every command and option. This page is generated from the commands: `python tests/cli_page.py` writes it again.

Paths and `--json` go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 interrupted.
`condit --install-completion` installs completion for your shell.

## Settings of a reference

`--style`, `--subject`, `--edges`, `--edges-map`, `--gray`, `--control` and `--lora` may be repeated. Their value is
`REF[:STRENGTH][,SETTING=VALUE...]`, as in `--style ref.png:0.6,when=0-0.7,mask=left.png`.

| setting | does | adapters |
|---|---|---|
| `when=0-0.7` | limits it to a part of the schedule | all |
| `mask=FILE` | limits it to the white part of an image | IP-Adapter, OminiControl, DEADiff |
| `where=PATH.*` | limits it to layers; several patterns are joined by `+` | IP-Adapter, DEADiff |
| `preset=style` | InstantStyle's blocks: `all`, `style`, `layout`, `style+layout` | IP-Adapter on SDXL and SD 1.5 |
| `subtract=a cat` | InstantStyle: words for content to subtract; several are joined by `+` | global IP-Adapters |
| `as=content` | which tokens of the reference: `style` (default) or `content` | DEADiff |
| `task=subject-512` | the task of a file that does not say it | OminiControl |
| `cached=independent` | an approximate cache: `independent` or `first-step` | OminiControl, trained jointly |

## Rows of a file

`condit generate --from rows.jsonl -o FOLDER` reads one request a row. Keys are the names of options;
`name` is that of the image's file; without it the file has the words of the prompt and a hash of the request. Options
of the command line apply to rows that do not set them.

```
{"prompt": "a fox", "seed": 3}
{"prompt": "a cat", "style": "ref.png:0.6,when=0-0.7", "steps": 8, "name": "cat"}
```

Each image is written whole or not at all. A second run makes the missing images only, so an interrupted run
ends with the same files as one that was not interrupted. `metadata.jsonl` has a line for each image, so that the folder
is a data set. A row that fails is named in `errors.jsonl`, the others are made, and the exit code is 1.
[Jobs](jobs.md) says how several processes or machines share the rows, and what a failure does.
"""


def own_commands(group, name: str = "condit") -> Iterator[tuple[str, object]]:
    """(name, command) of the library's commands, without those of the laboratory."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from own_commands(command, f"{name} {key}")
        elif not command.callback.__module__.startswith("condit_lab"):
            yield f"{name} {key}", command


def section(name: str, command) -> str:
    """A command as Markdown: its help, its usage and its options by group."""
    context = typer.Context(command, info_name=name)
    text = re.sub(r"\x08\n(.*?)(?=\n\n|$)", r"```\n\1\n```", command.help.strip(), flags=re.S)
    words = [f"## {name}", "", text]
    usage = " ".join(command.collect_usage_pieces(context))
    words += ["", f"    {name} {usage}", ""]
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in record[0]:
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            groups.setdefault(vars(parameter).get("rich_help_panel") or usual, []).append(record)
    for heading, records in groups.items():
        words += [f"| {heading} | |", "|---|---|"]
        words += [row(option, text) for option, text in records]
        words.append("")
    return "\n".join(words)


def row(option: str, text: str) -> str:
    return f"| `{option.replace('|', chr(92) + '|')}` | {text.replace('|', chr(92) + '|')} |"


def page() -> str:
    group = typer.main.get_command(app)
    return "\n".join([HEAD, *(section(name, command) for name, command in own_commands(group))]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
