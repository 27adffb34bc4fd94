"""`dalle-jax configs`: list the shipped configurations, or print one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.config import to_json
from dalle_jax.config.files import find_config, list_configs, load_config


@dataclass(frozen=True, kw_only=True)
class ConfigsArgs:
    """List the configurations that come with the package, for `dalle-jax train NAME`; or print the file of one, to
    start a configuration of your own from."""

    name: Positional[Annotated[str | None, arg(metavar="[NAME]")]] = None
    """configuration to print; a file of that name here takes precedence"""
    path: bool = False
    """print the path of the file, not its content"""
    json: JsonFlag = False


def run(args: ConfigsArgs) -> dict[str, Any]:
    """Print the list, the file or its path."""
    if args.name is None:
        if args.path:
            raise ValueError("Expected NAME with --path, got none. Use `dalle-jax configs NAME --path`.")
        configs = list_configs()
        width = max(map(len, configs), default=0)
        for name, summary in configs.items():
            print(f"{name:<{width}}  {summary}")
        return {"configs": configs}
    file = find_config(args.name)
    print(file if args.path else file.read_text(encoding="utf-8"), end="\n" if args.path else "")
    return {"path": str(file), "config": json.loads(to_json(load_config(file)))}
