"""coterie.toml: what a business declares. Every field is checked, and an error names file, field and mend."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from coterie.declared import Several, Strict
from coterie.errors import CoterieError
from coterie.experts.library import check_name
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.specs import DatabaseSpec, GraphSpec, TablesSpec
from coterie.model.pull import DEFAULT

FILE = "coterie.toml"
LEARNING_RATES = {"lora": 1e-3, "adapter": 1e-3, "prompt": 3e-2, "prefix": 1e-2, "full": 5e-5}
_RATES = ", ".join(f"{kind} {rate:g}" for kind, rate in LEARNING_RATES.items())
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraSpec(Strict):
    """[experts.NAME.lora]: the size of the expert."""

    rank: int = Field(16, ge=1, le=256, description="rank of the low-rank change")
    alpha: float = Field(32, gt=0, description="strength: the change is scaled by alpha / rank")
    targets: list[Projection] = Field(
        list(get_args(Projection)), min_length=1, description="projections that the expert changes"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    dora: bool = Field(False, description="learn the length of each row of the weights apart (DoRA)")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs left out at random while training")


class AdapterSpec(Strict):
    """[experts.NAME.adapter]: the size of a bottleneck adapter."""

    size: int = Field(36, ge=1, description="width of the bottleneck")
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby", description="after attention and feed-forward (houlsby), or after the feed-forward only (pfeiffer)"
    )
    activation: Literal["relu", "swish", "gelu"] = Field("swish", description="between down and up")


class PromptSpec(Strict):
    """[experts.NAME.prompt]: the size of a soft prompt, or of a prefix."""

    tokens: int = Field(16, ge=1, le=1024, description="virtual tokens before the text")
    start: str = Field("", description="words whose embeddings they start from; default: `system` or `description`")


class PreferenceSpec(Strict):
    """[experts.NAME.preference]: how pairs of a better and a worse answer are learned, after `train`."""

    beta: float = Field(0.1, gt=0, description="strength of the tie to the expert before")
    epochs: int = Field(1, ge=1, le=100, description="passes over the pairs")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="peak learning rate")


class TrainingSpec(Strict):
    """[experts.NAME.training]: how it is trained."""

    epochs: int = Field(3, ge=1, le=1000, description="passes over the data")
    batch: int = Field(16, ge=1, le=4096, description="examples for each update")
    learning_rate: float | None = Field(None, gt=0, le=1, description=f"peak learning rate; by kind: {_RATES}")
    first_layer: int = Field(
        0,
        ge=0,
        description="lora, adapter: layers below stay as they are; what they compute is kept on disk",
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps that the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    seed: int = Field(0, ge=0, lt=2**32, description="fixes split, order and start: same seed, same expert")
    held_out: float = Field(0.05, gt=0, le=0.5, description="share of the rows kept for evaluation while training")
    max_tokens: int = Field(1024, ge=16, description="rows longer than this are left out, and named")
    whole_answers: bool = Field(
        False,
        description="choices: learn to write them out, too, for programs that do not hold the answer to a list",
    )


class ExpertSpec(Strict):
    """[experts.NAME]: one expert and its data."""

    kind: Literal["lora", "adapter", "prompt", "prefix", "full", "classifier"] = Field(
        "lora", description="kind of expert"
    )
    description: str = Field("", description="what it is for; shown to people")
    system: str = Field("", description="instruction it is trained with, given to requests that bring none")
    train: Several = Field(min_length=1, description="a data file (.jsonl, .csv, .parquet) or a list of them")
    test: Several = Field([], description="files only to measure with; their near-duplicates leave the training data")
    columns: dict[Literal["prompt", "completion", "messages", "system", "chosen", "rejected"], str] = Field(
        {}, description="which column of the file holds prompt and completion (or messages), and system"
    )
    choices: bool = Field(False, description="answer only with completions seen in training (classification)")
    error: float = Field(
        0.02, gt=0, lt=1, description="classifier: share of wrong labels among those that it is sure of"
    )
    preferences: Several = Field([], description="files of pairs (prompt, chosen, rejected), learned after `train`")
    lora: LoraSpec = LoraSpec()
    adapter: AdapterSpec = AdapterSpec()
    prompt: PromptSpec = PromptSpec()
    preference: PreferenceSpec = PreferenceSpec()
    training: TrainingSpec = TrainingSpec()

    @model_validator(mode="before")
    @classmethod
    def _classifier(cls, given: Any) -> Any:
        """A classifier has choices whether or not that is said, and nothing else to prefer."""
        if isinstance(given, dict) and given.get("kind") == "classifier":
            if given.get("preferences"):
                raise ValueError("a classifier learns from `train` alone; leave `preferences` out")
            if not given.setdefault("choices", True):
                raise ValueError("a classifier answers with one of its choices; leave `choices` out")
        elif isinstance(given, dict) and "error" in given:
            raise ValueError("`error` is of experts of kind classifier")
        return given


class BusinessSpec(Strict):
    """[business]: the whole."""

    name: str = Field("My business", min_length=1, description="shown on the page")
    base: str = Field(DEFAULT, min_length=1, description="base model: a hub id, a folder or a .gguf file")
    welcome: str = Field("", description="a sentence under the name, on the page")
    suggestions: list[str] = Field([], description="questions offered on the page", max_length=6)
    context: int = Field(2048, ge=64, description="most tokens of one conversation, answer included")
    slots: int = Field(16, ge=1, le=1024, description="requests generated at once")
    queue: int = Field(64, ge=1, description="requests that may wait; more get 429")
    expert_memory: int = Field(
        1024,
        ge=1,
        description="MiB that experts in memory may take, as many again those of kind full; the longest idle go first",
    )
    cache_memory: int = Field(
        256,
        ge=0,
        description="MiB that what was read may take after its request; texts that begin alike share it",
    )
    pinned: list[str] = Field([], description="experts that stay in memory, however long they are idle")
    weights: Literal["exact", "int8"] = Field(
        "exact",
        description="what the base model's matrices may be held in while answers are written: as they are, or "
        "rounded to 8 bits on a processor without AVX512-BF16, which changes some answers of a base that is no GGUF",
    )


class RuleSpec(Strict):
    """[[routing.rules]]: experts forced or forbidden for a channel, or for words in the question."""

    channel: str = Field("", description="only requests on this channel (header X-Coterie-Channel); empty: any")
    words: list[str] = Field([], description="only questions with one of these words; none: any")
    use: list[str] = Field([], description="the nearest of these answers, however far the question is")
    forbid: list[str] = Field([], description="none of these answers")


class RoutingSpec(Strict):
    """[routing]: how "auto" chooses."""

    top_k: int = Field(1, ge=1, le=64, description="most experts that answer one request together")
    combine: Literal["merge", "logits", "arrow"] = Field(
        "merge", description="how they do: weighted sum of updates, mean of scores, or token by token (Arrow)"
    )
    abstain: float = Field(
        0.03, ge=0, lt=1, description="an expert turns away what is farther off than this share of its own inputs"
    )
    rules: list[RuleSpec] = Field([], description="experts forced or forbidden for a channel or for words")


class DeskRuleSpec(Strict):
    """[[desk.rules]]: a conversation that a person must see. All conditions that are given must hold."""

    reason: str = Field(min_length=1, max_length=80, description="shown to the agent, such as vulnerable_customer")
    words: list[str] = Field([], description="one of these words or phrases is in the customer's message")
    topics: list[str] = Field([], description="one of these experts, or of their labels, answers")
    amount_above: float | None = Field(None, ge=0, description="the message names an amount of money above this")
    profile: dict[str, str | bool | float] = Field({}, description="the customer's profile has these values")
    negative: bool = Field(False, description="the message is negative, as `sentiment` sees it")
    queue: str = Field("general", min_length=1, description="the queue that it goes to")


class CrmSpec(Strict):
    """[desk.crm]: where the customer's record is, and what of it a model may see."""

    kind: Literal["salesforce", "sql"] = Field(description="which CRM")
    url: str = Field(min_length=1, description="salesforce: https://NAME.my.salesforce.com; sql: SQLAlchemy's URL")
    client_id_env: str = Field("SALESFORCE_CLIENT_ID", description="salesforce: the environment variable of the id")
    client_secret_env: str = Field("SALESFORCE_CLIENT_SECRET", description="salesforce: and of the secret")
    find: str = Field("", description="sql: gives the id of the customer named :customer")
    read: str = Field("", description="sql: gives the fields of the customer with :id")
    fields: dict[str, str] = Field({}, description="fields that may reach the prompt, and the names they have there")
    case_on: list[Literal["handoff", "resolved"]] = Field([], description="a case is opened when this happens")
    note_on: list[Literal["handoff", "resolved"]] = Field(
        [], description="a note is written into the conversation's case when this happens"
    )
    link: str = Field("", pattern="^(https?://.*)?$", description="where the desk is; cases and notes link to it")
    case: str = Field("", description="sql: INSERTs a case with :id, :subject, :text and a unique :key")
    case_of: str = Field("SELECT id FROM cases WHERE key = :key", description="sql: gives the id of the case of a key")
    note: str = Field("", description="sql: INSERTs a note with :case, :text and a unique :key")
    note_of: str = Field("SELECT id FROM notes WHERE key = :key", description="sql: gives the id of the note of a key")


class WebhookSpec(Strict):
    """[[desk.webhooks]]: another system that is told what happens at the desk."""

    url: str = Field(pattern="^https?://", description="where it is sent to, by POST")
    secret_env: str = Field(min_length=1, description="the environment variable that holds the secret to sign with")
    kinds: list[Literal["message", "note", "suggestion", "event", "rating", "action", "erasure"]] = Field(
        ["message", "event", "rating", "action", "erasure"],
        description="which entries of a conversation, and what else: thumbs, steps of procedures, customers erased",
    )
    texts: bool = Field(False, description="tell what was said, too")


class EmailSpec(Strict):
    """[desk.email]: e-mail as a second channel."""

    address: str = Field(
        pattern=r"^[^\s@<>,;:\"]+@[^\s@<>,;:\"]+$", description="where customers write, and who answers them"
    )
    name: str = Field("", pattern=r"^[^\r\n]*$", description="shown with it; default: the name of the business")
    imap: str = Field(pattern=r"^imaps?(\+starttls)?://", description="where mail is read, such as imaps://HOST")
    smtp: str = Field(
        pattern=r"^smtps?(\+starttls)?://",
        description="where mail is sent, such as smtps://HOST or smtp+starttls://HOST",
    )
    user: str = Field("", description="who signs in at both; default: the address")
    password_env: str = Field("COTERIE_EMAIL_PASSWORD", description="the environment variable of the password")
    folder: str = Field("INBOX", min_length=1, description="the folder that is read")
    poll_s: float = Field(60.0, ge=1, description="seconds between two looks, where the server cannot tell (IDLE)")
    plus: bool = Field(True, description="the server takes mail to NAME+anything@HOST, too")
    authserv: str = Field("", description="your own server's name in Authentication-Results; no other is believed")
    identify: bool = Field(
        False, description="a sender whom `authserv` has verified is the customer of that address, with their record"
    )
    per_hour: int = Field(20, ge=1, description="mails of one sender that the assistant answers in an hour")
    most_mib: int = Field(25, ge=1, le=200, description="of a larger mail only the beginning is read")
    handed_over: str = Field(
        "Thank you for your message. A person will answer you here.",
        description="what is sent when a person is called; empty: nothing",
    )


class LanguageSpec(Strict):
    """[desk.languages.CODE]: what visitors read first in one language, such as `ar`.

    Our own words are there in English, German, French, Spanish and Arabic; whoever changes them in [desk] gives the
    other languages here.
    """

    disclosure: str = Field("", description="the first thing that a visitor reads; default: as in [desk]")
    greeting: str = Field("", description="shown above an empty conversation; default: as in [desk]")


class DeskSpec(Strict):
    """[desk]: customer service."""

    database: str = Field("sqlite:///.coterie/desk.db", description="SQLAlchemy URL: sqlite or postgresql")
    origins: list[str] = Field([], description="sites that may show the widget, such as https://shop.example")
    disclosure: str = Field(
        "You are talking to an AI. It can be wrong; you can ask for a person at any time.",
        min_length=1, description="the first thing that a visitor reads",
    )  # fmt: skip
    greeting: str = Field("How can we help?", description="shown above an empty conversation")
    languages: dict[Annotated[str, Field(pattern="^[a-z]{2,3}$")], LanguageSpec] = Field({})
    unknown: Literal["hand_over", "answer"] = Field(
        "hand_over", description="when no expert is near enough and no knowledge was found"
    )
    error: float = Field(0.02, gt=0, lt=1, description="share of wrong answers that `coterie desk calibrate` aims at")
    failures: int = Field(2, ge=1, description="a person is called when an answer has failed so often in a row")
    sentiment: str = Field("", description="an expert with choices that tells negative messages")
    negative: list[str] = Field(["negative"], description="its labels that count as negative")
    rules: list[DeskRuleSpec] = Field([], description="conversations that a person must see")
    answers: dict[str, str] = Field({}, description="for a label of an expert with choices, what the customer is told")
    canned: dict[str, str] = Field({}, description="replies that agents can insert, by their short names")
    crm: CrmSpec | None = Field(None, description="where the customer's record is")
    procedures: str = Field("procedures", min_length=1, description="the folder of guided flows, one file for each")
    hosts: list[str] = Field([], description="hosts that actions of procedures may call, such as api.shop.example")
    webhooks: list[WebhookSpec] = Field([], description="other systems that are told what happens")
    email: EmailSpec | None = Field(None, description="e-mail as a second channel")
    idle_hours: float = Field(24.0, gt=0, description="a conversation that the bot has answered is resolved after this")
    workers: int = Field(
        32,
        ge=1,
        le=256,
        description="answers worked on at once; more than the engine has `slots`, so that none stays empty",
    )


SourceSpec = Annotated[DocumentsSpec | GraphSpec | DatabaseSpec | TablesSpec, Field(discriminator="kind")]


class KnowledgeSpec(Strict):
    """[knowledge]: how answers are grounded. Each source has a section of its own, [knowledge.NAME]."""

    unsupported: Literal["mark", "withhold", "quote"] = Field(
        "mark",
        description="a sentence that no source says: `[?]` is put after it, or it is left out; `quote` also quotes the "
        "sources where nothing else is left",
    )
    missing: Literal["say", "answer"] = Field(
        "say", description="where no source has anything near: say so, or let the expert answer without sources"
    )
    unknown: str = Field("I don't know: our sources say nothing about that.", min_length=1, description="what is said")
    tokens: int = Field(600, ge=300, description="most tokens of evidence put before the model")
    embeddings: str = Field(
        "", description="address of an OpenAI-compatible server for embeddings; empty: all-MiniLM-L6-v2 here"
    )
    embeddings_model: str = Field(
        "",
        description="its model; its key is taken from $COTERIE_EMBEDDINGS_KEY. Without an address: a folder, or a hub "
        "id, of a BERT model of sentence-transformers' kind",
    )
    vectors: str = Field(
        "",
        pattern=r"^(|postgres(ql)?(\+psycopg)?://.+)$",
        description="address of a PostgreSQL with pgvector that keeps the vectors of documents; empty: files here",
    )
    sources: dict[str, SourceSpec] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, given: Any) -> Any:
        """The tables within [knowledge] are its sources, and those within [knowledge.sources] too."""
        if not isinstance(given, dict):
            return given
        tables = {name: value for name, value in given.items() if isinstance(value, dict)}
        within = tables.pop("sources", {})
        return {n: v for n, v in given.items() if n not in tables and n != "sources"} | {"sources": within | tables}

    @model_validator(mode="after")
    def _documents_to_read(self) -> "KnowledgeSpec":
        for name, spec in self.sources.items():
            read = spec.extract.documents if isinstance(spec, GraphSpec) and spec.extract else ""
            if read and not isinstance(self.sources.get(read), DocumentsSpec):
                raise ValueError(f"{name}.extract.documents: {read!r} is no source of documents that is declared here")
        return self


class RetentionSpec(Strict):
    """[retention]: how long customers' data is kept; `coterie serve` deletes what is older, by itself."""

    days: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="days for each room: `conversations` count from their last change once they are resolved, "
        "`consents` of a customer from the last entry",
    )
    every_hours: float = Field(24.0, gt=0, description="how often it is looked for; what was missed is caught up with")


class ConsentSpec(Strict):
    """[privacy.consents.NAME]: something that customers are asked to agree to."""

    text: str = Field(min_length=1, max_length=4000, description="what they are asked, as they read it")
    language: str = Field("", max_length=40, description="its language, such as de")


class PrivacySpec(Strict):
    """[privacy]: what models get to see of a request to the API or on the chat page. The desk's are always masked."""

    mask: Literal["accounts", "always", "never"] = Field(
        "accounts",
        description="when private data in them is hidden from models and put back into the answer: once there are "
        "accounts, always, or never",
    )
    consents: dict[str, ConsentSpec] = Field({}, description="what customers are asked to agree to, by its purpose")


class Config(Strict):
    """A whole coterie.toml."""

    business: BusinessSpec = BusinessSpec()
    experts: dict[str, ExpertSpec] = Field({})
    routing: RoutingSpec = RoutingSpec()
    desk: DeskSpec = DeskSpec()
    privacy: PrivacySpec = PrivacySpec()
    retention: RetentionSpec = RetentionSpec()
    knowledge: KnowledgeSpec = KnowledgeSpec()


def read_config(folder: Path) -> Config:
    """The declaration in `folder`. Raises CoterieError, naming the field, where it cannot be used."""
    file = folder / FILE
    try:
        config = Config.model_validate(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except FileNotFoundError as error:
        raise CoterieError(f"{folder}: no {FILE} here; `coterie init {folder}` makes one") from error
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise CoterieError(f"{file}: {described(error)} (see docs/coterie-toml.md)") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise CoterieError(f"{file}: not valid TOML: {error}") from error
    for section, names in (("experts", config.experts), ("knowledge", config.knowledge.sources)):
        for name in names:
            try:
                check_name(name)
            except CoterieError as error:
                raise CoterieError(f"{file}: {section}: {error}") from error
    return config


def described(error: ValidationError) -> str:
    """The first thing that is wrong: the field, what it must be, and what it is."""
    given: Any
    first = error.errors()[0]
    loc = [part for part in first["loc"] if part != "[key]"]
    if loc[:2] == ["knowledge", "sources"]:  # the file has them right under [knowledge], and no tag of their kind
        del loc[1]
        del loc[2:3]
    field = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such field"
    if first["type"] == "missing":
        return f"{field}: this field is needed"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given = first["input"].get("kind", "nothing") if isinstance(first["input"], dict) else first["input"]
        return f"{field}.kind: must be 'documents', 'graph', 'database' or 'tables', not {given!r}"
    if first["type"] in ("model_type", "dict_type"):
        return f"{field}: must be a table"
    given = first["input"]
    said = first["msg"].replace("Input should be", "must be")
    return f"{field}: {said}, not {given!r}" if isinstance(given, str | int | float) else f"{field}: {said}"
