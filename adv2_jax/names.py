"""What things of a run are called, in its files, on the screen and on a page."""

ATTACKS = ("pgd", "adv2")  # as in files


def attack_name(attack: str, threat: str | None) -> str:
    """The name of an attack; the plain attack by a flow has one of its own."""
    names = {"pgd": "StAdv" if threat == "flow" else "PGD", "adv2": "ADV²"}
    return names.get(attack, attack)
