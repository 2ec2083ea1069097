"""Makes shop.db beside this file: three invented orders of ada@example.com, delivered 3, 20 and 90 days ago."""

import sqlite3
from datetime import date, timedelta
from pathlib import Path

ORDERS = [("LW-10001", "24.90", 3), ("LW-10002", "349.00", 20), ("LW-10003", "18.00", 90)]


def make(file: Path) -> None:
    """A fresh database in `file`."""
    file.unlink(missing_ok=True)
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE orders (number TEXT PRIMARY KEY, email TEXT, total NUMERIC, delivered DATE)")
        database.execute(
            "CREATE TABLE refunds (number TEXT REFERENCES orders, amount NUMERIC, why TEXT, key TEXT UNIQUE)"
        )
        for number, total, days in ORDERS:
            row = (number, "ada@example.com", total, (date.today() - timedelta(days=days)).isoformat())
            database.execute("INSERT INTO orders VALUES (?, ?, ?, ?)", row)


if __name__ == "__main__":
    make(Path(__file__).parent / "shop.db")
