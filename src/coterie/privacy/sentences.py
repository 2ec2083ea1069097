"""Sentences to learn from, in which every private span is known: frames of ours, filled by Faker.

Notable: nobody's data is needed to train the tagging expert. Names, streets, cities and companies come from Faker's
lists of three dozen countries; a share of the sentences is written as customers
write, in small letters or without the last sign.
"""

import random
import re
from string import ascii_uppercase, digits
from typing import Any

from faker import Faker

from coterie.data.private import Span
from coterie.privacy.frames import FRAMES, NATIONALITIES, PLAIN
from coterie.privacy.teach import Sentence

LOCALES = (
    "en_US", "en_GB", "en_AU", "en_CA", "en_IE", "en_NZ", "en_IN", "de_DE", "de_AT", "de_CH", "fr_FR", "fr_CH", "es_ES",
    "es_MX", "it_IT", "nl_NL", "nl_BE", "pl_PL", "cs_CZ", "sk_SK", "sv_SE", "da_DK", "no_NO", "fi_FI", "pt_PT", "pt_BR",
    "hu_HU", "hr_HR", "sl_SI", "ro_RO", "tr_TR", "et_EE", "lt_LT", "lv_LV",
)  # fmt: skip
SLOT = re.compile(r"\{(\w+)\}")
KIND_OF = {"first": "name", "last": "name", "street": "address", "city": "place", "country": "place",
           "state": "place", "prefix": "title", "job": "title", "year": "date", "time": "date", "years": "age",
           "company": "organisation", "number": "order"}  # fmt: skip
STATES = ("Texas", "Ohio", "Kent", "Bavaria", "Scotland", "Ontario", "Florida", "Utah", "Nevada", "Brittany", "Wales",
          "Catalonia", "Lombardy", "New South Wales", "Sussex", "Michigan", "North Carolina", "Tyrol",
          "Oregon")  # fmt: skip
PREFIXES = ("Mr.", "Mrs.", "Ms.", "Dr.", "Mr", "Mrs", "Ms", "Miss", "Prof.", "Sir", "Madam", "Herr", "Frau", "Dr")
JOBS = ("CEO", "CFO", "manager", "Head of Sales", "nurse", "vice president", "plumber", "clerk", "Chief Engineer")
TIMES = ("yesterday", "last week", "next Monday", "two years ago", "this morning", "tomorrow", "the 1990s",
         "Tuesday at 3 pm", "last summer", "10:45 am", "on Friday")  # fmt: skip
DATES = ("%d/%m/%Y", "%Y-%m-%d", "%d.%m.%y", "%B %d, %Y", "%d %B %Y", "%b %d", "%A", "%B %Y", "%m/%d/%y", "%d %b")
BRAND = (["Ver", "Lum", "Tek", "Nor", "Aqua", "Zen", "Bru", "Cor", "Max", "Sol", "Pix", "Quor", "Dal", "Fen", "Gri"],
         ["ia", "ex", "ova", "ent", "on", "ix", "ara", "el", "is", "us", "eon", "ity", "well", "soft", "mart"],
         ["", "", " Ltd", " Bank", " Inc.", " Group", " GmbH", " & Sons", " Airlines", " Foods"])  # fmt: skip
TOGETHER = (1, 1, 1, 1, 1, 1, 2, 4)  # sentences of a message


class Filler:
    """Fills slots: a person of one country, who may live in another."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fakers: dict[str, Any] = {locale: Faker(locale, use_weighting=False) for locale in LOCALES}
        for faker in self.fakers.values():
            faker.seed_instance(self.rng.randrange(2**32))
        self.english = self.person = self.place = self.fakers["en_GB"]

    def fill(self, frame: str) -> Sentence:
        """`frame` with a value in each slot, and where it stands."""
        english = [f for locale, f in self.fakers.items() if locale.startswith("en")]
        self.person = self.rng.choice(english if self.rng.random() < 0.2 else list(self.fakers.values()))
        self.place = self.rng.choice(english) if self.rng.random() < 0.5 else self.person
        text, spans, at = "", list[Span](), 0
        for slot in SLOT.finditer(frame):
            text += frame[at : slot.start()]
            filling, at = str(getattr(self, slot[1])()).strip(), slot.end()
            spans.append(Span(len(text), len(text) + len(filling), KIND_OF.get(slot[1], slot[1])))
            text += filling
        return Sentence(text + frame[at:], tuple(spans))

    def _some(self, letters: str, low: int, high: int) -> str:
        return "".join(self.rng.choice(letters) for _ in range(self.rng.randint(low, high)))

    def first(self) -> Any:
        return self.person.first_name()

    def last(self) -> Any:
        return self.person.last_name()

    def name(self) -> str:
        """Mostly first and last; also with a middle name or letter, turned round, or one of them alone."""
        first, last, how = self.first(), self.last(), self.rng.random()
        middle = self._some("ABCDEFGHIJKLMNOPRSTW", 1, 1) + self.rng.choice([".", ""])
        forms = ((0.55, f"{first} {last}"), (0.7, first), (0.78, f"{first} {middle} {last}"),
                 (0.84, f"{first} {self.first()} {last}"), (0.9, f"{last}, {first}"), (0.95, last))  # fmt: skip
        return next((form for upto, form in forms if how < upto), f"{first[0]}. {last}")

    def street(self) -> Any:
        where = self.rng.choice([self.person, self.place])
        return self.rng.choice([where.street_name, where.street_address])()

    def address(self) -> str:
        """In a country's own form, or a street of one country within the form of another."""
        how, rng, place = self.rng.random(), self.rng, self.place
        if how < 0.45:
            whole = str(place.address())
            return whole if how < 0.3 else whole.replace("\n", ", ")
        street = self.person.street_address() if rng.random() < 0.7 else f"{rng.randint(1, 9999)} {self.street()}"
        if how < 0.6:
            return str(street)
        number = rng.randint(1, 999)
        flat = rng.choice(["", f" Apt. {number}", f" Suite {number}", f", Flat {number}"])
        rest = (place.city(), self._some("ABCDEFGHIKLMNOPRSTVWXY", 2, 2), place.postcode(), self.country())
        join = rng.choice([", ", "\n", " ", "\n, "])
        parts = [str(part) for part in rest if rng.random() < 0.65]
        return join.join([f"{street}{flat}", *parts])

    def city(self) -> Any:
        return self.rng.choice([self.person, self.place]).city()

    def country(self) -> Any:
        return self.rng.choice([self.english.country(), self.place.current_country(), "the UK", "USA", "UK", "the US"])

    def state(self) -> str:
        return self.rng.choice(STATES)

    def company(self) -> str:
        real = str(self.rng.choice([self.person, self.place]).company())
        return self.rng.choice([real, real.split()[0].rstrip(","), "".join(map(self.rng.choice, BRAND))])

    def prefix(self) -> str:
        return self.rng.choice(PREFIXES)

    def job(self) -> str:
        job = str(self.english.job()).split(",")[0]
        return self.rng.choice([job, job.lower(), self.rng.choice(JOBS)])

    def nationality(self) -> str:
        return self.rng.choice(NATIONALITIES)

    def year(self) -> int:
        return self.rng.randint(1920, 2030)

    def time(self) -> str:
        return self.rng.choice(TIMES)

    def date(self) -> str:
        return str(self.person.date_object().strftime(self.rng.choice(DATES)))

    def age(self) -> str:
        return str(self.rng.randint(1, 99))

    def years(self) -> str:
        return self.rng.choice(["{}-year-old", "{} year old"]).format(self.rng.randint(2, 99))

    def zip(self) -> Any:
        return self.rng.choice([self.place.postcode(), self.person.postcode(), self._some(digits, 5, 5)])

    def phone(self) -> str:
        if self.rng.random() < 0.6:
            return str(self.rng.choice([self.person, self.place]).phone_number())
        parts = [self._some(digits, 2, 4), self._some(digits, 2, 4), self._some(digits, 2, 4)]
        return self.rng.choice(" -.").join(parts)

    def email(self) -> Any:
        return self.rng.choice([self.person.ascii_free_email, self.person.ascii_company_email])()

    def card(self) -> Any:
        return self.english.credit_card_number()

    def iban(self) -> Any:
        return self.rng.choice([self.english, self.fakers["de_DE"], self.fakers["fr_FR"]]).iban()

    def number(self) -> str:
        """Of an order, a ticket, a customer, an invoice."""
        letters, number = self._some("ABCDEFGHJKLMNPRSTUVWXYZ", 1, 4), self._some(digits, 4, 10)
        forms = (f"{letters}-{number}", f"{letters}{number}", number, f"#{number}", f"{number}-{letters}")
        return self.rng.choice(forms)

    def ssn(self) -> str:
        sep = self.rng.choice("- ")
        return sep.join((self._some(digits, 3, 3), self._some(digits, 2, 2), self._some(digits, 4, 4)))

    def licence(self) -> str:
        """Of a driver, as several American states and Britain write it."""
        letters = self._some(ascii_uppercase, 1, self.rng.choice([1, 1, 2, 5]))
        return letters + self._some(digits, 6, 13)

    def ip(self) -> Any:
        return self.rng.choice([self.place.ipv4, self.place.ipv6])()

    def url(self) -> str:
        domain = str(self.place.domain_name())
        return (
            self.rng.choice(["", "www.", "https://www.", "http://"]) + domain + self.rng.choice(["", "", "/", "/help"])
        )


def sentences(count: int, seed: int = 0) -> list[Sentence]:
    """`count` sentences, the same for the same seed and version of Faker."""
    filler = Filler(seed)
    rng = filler.rng

    def one() -> Sentence:
        return _as_written(filler.fill(rng.choice(PLAIN if rng.random() < 0.12 else FRAMES)), rng)

    return [_in_a_row([one() for _ in range(rng.choice(TOGETHER))], rng) for _ in range(count)]


def _in_a_row(some: list[Sentence], rng: random.Random) -> Sentence:
    """Several sentences as one message."""
    text, spans = "", list[Span]()
    for sentence in some:
        text += rng.choice([" ", " ", "\n", "\n\n"]) if text else ""
        spans += [Span(len(text) + s.start, len(text) + s.end, s.kind) for s in sentence.spans]
        text += sentence.text
    return Sentence(text, tuple(spans))


def _as_written(sentence: Sentence, rng: random.Random) -> Sentence:
    """Some in small letters or in capitals (each stays one letter, so spans stay), some without the last sign."""
    how, text = rng.random(), sentence.text
    if how < 0.18:
        changed = (c.lower() if how < 0.15 else c.upper() for c in text)
        return Sentence("".join(d if len(d) == 1 else c for c, d in zip(text, changed, strict=True)), sentence.spans)
    if how < 0.3 and text[-1:] in ".?!" and all(s.end < len(text) for s in sentence.spans):
        return Sentence(text[:-1], sentence.spans)
    return sentence
