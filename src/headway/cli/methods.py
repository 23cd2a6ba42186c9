"""`headway methods`: the catalogue, or one method's card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from headway.core.method import Method


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, or module:Class.")] = None,
    json: JsonFlag = False,
) -> None:
    """List the methods, or show the card of one: what it buys and costs, its options, what was measured."""
    from headway.core import registry

    if name is not None:
        card = describe(registry.find("methods", name, name))
        print_json(card) if json else _print_card(card)
        return
    cards = [describe(registry.find("methods", each, each)) for each in registry.names("methods")]
    if json:
        print_json(cards)
        return
    rows = [(c["name"], "exact" if c["exact"] else "approximate", c["buys"], c["costs"]) for c in cards]
    print_table(["method", "losses", "buys", "costs"], rows)


def describe(method: type[Method]) -> dict[str, Any]:
    """A method's card with its points, options and evidence, as plain data."""
    from headway.experiments.evidence import evidence_folder, load_evidence

    file = evidence_folder() / f"{method.card.name}.json"
    options = [
        {
            "name": info.alias or key,
            "type": _type_name(info.annotation),
            "default": info.get_default(),
            "help": info.description,
        }
        for key, info in method.Options.model_fields.items()
    ]
    return {
        **method.card.to_dict(),
        "points": list(method.points()),
        "options": options,
        "evidence": load_evidence(file).model_dump(mode="json") if file.is_file() else None,
    }


def _type_name(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    return text.replace("typing.", "").replace("NoneType", "None")


def _print_card(card: dict[str, Any]) -> None:
    facts = [
        ("paper", card["paper"]),
        ("losses", "exact" if card["exact"] else f"approximate: {card['approximates']}"),
        ("buys", card["buys"]),
        ("costs", card["costs"]),
        ("acts on", ", ".join(card["points"])),
        ("inside", ", ".join(card["before"])),
        ("outside", ", ".join(card["after"])),
        *(("needs", f"{other}: {why}") for other, why in card["needs"].items()),
        *(("refuses", f"{other}: {why}") for other, why in card["refuses"].items()),
        ("differs", card["deviations"]),
        ("status", card["status"]),
    ]
    print(f"{card['name']}: {card['title']}\n{card['summary']}")
    print_table(["", ""], [fact for fact in facts if fact[1]])
    if card["options"]:
        rows = [(o["name"], o["type"], o["default"], o["help"]) for o in card["options"]]
        print_table(["option", "type", "default", "what it does"], rows)
    if card["evidence"]:
        verdict = {True: "held", False: "did not hold", None: "not judged"}
        rows = [
            (
                r["title"],
                r["claimed"],
                "" if r["measured"] is None else f"{r['measured']} {r['unit']}",
                verdict[r["held"]],
            )
            for r in card["evidence"]["rows"]
        ]
        hardware = card["evidence"]["hardware"]
        print_table(["measured", "claimed", f"on {hardware.get('gpu') or hardware.get('cpu')}", ""], rows)
