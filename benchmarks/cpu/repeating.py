"""Texts whose answers repeat them, and free chat whose answers do not. Needs no package."""

from __future__ import annotations

CODE = '''import json


def load_orders(path):
    """Reads the orders of a file, one JSON document a line."""
    orders = []
    with open(path) as lines:
        for number, line in enumerate(lines, start=1):
            order = json.loads(line)
            order["number"] = number
            orders.append(order)
    return orders


def total_of(orders, currency="EUR"):
    """The sum of the orders in a currency."""
    total = 0.0
    for order in orders:
        if order["currency"] == currency:
            total += order["price"] * order["count"]
    return round(total, 2)


def by_customer(orders):
    """Orders by the customer who made them."""
    customers = {}
    for order in orders:
        customers.setdefault(order["customer"], []).append(order)
    return customers
'''
PEOPLE = {
    "Ada Byron": "London",
    "Grace Hopper": "New York",
    "Emmy Noether": "Erlangen",
    "Mary Cartwright": "Aynho",
    "Sofia Kovalevskaya": "Moscow",
    "Hypatia": "Alexandria",
    "Katherine Johnson": "Hampton",
}
RECORDS = "\n".join(
    f'{{"id": {100 + at}, "name": "{name}", "city": "{city}", "orders": {at * 3 % 7}}}'
    for at, (name, city) in enumerate(PEOPLE.items())
)
TOKENS = 160
"""Of each answer."""
TOPICS = ("the sea", "an old clock", "a lost key", "the first snow", "a train at night", "bread", "a tower", "rain")


WORKS = ("edit", "extract", "chat")


def prompts(work: str, count: int, first: int = 0) -> list[str]:
    """`count` different ones; the longest common beginning is the request's own number, from `first` on."""
    numbers = range(first, first + count)
    if work == "edit":
        task = "# The file below, unchanged but for the name of the module:\n"
        return [f"# version {at}\n{CODE}\n{task}# version {at}\n{CODE[:60]}" for at in numbers]
    if work == "extract":
        head = RECORDS.splitlines()[0]
        return [f"List {at}:\n{RECORDS}\n\nList {at}, copied without a change:\n{head}\n" for at in numbers]
    return [f"Write a long story about {TOPICS[at % len(TOPICS)]}, part {at}.\n\n" for at in numbers]
