"""What a visitor reads before anything was said, in their language: that they talk to an AI, and a greeting."""

from coterie.config import DeskSpec

OURS = {  # of our own default words; a business that says it in other words says those in its languages, too
    "de": (
        "Sie sprechen mit einer KI. Sie kann sich irren; Sie können jederzeit nach einem Menschen fragen.",
        "Wie können wir helfen?",
    ),
    "fr": (
        "Vous parlez à une IA. Elle peut se tromper ; vous pouvez demander une personne à tout moment.",
        "Comment pouvons-nous vous aider ?",
    ),
    "es": (
        "Está hablando con una IA. Puede equivocarse; puede pedir hablar con una persona en cualquier momento.",
        "¿En qué podemos ayudarle?",
    ),
    "ar": ("أنت تتحدث مع ذكاء اصطناعي. قد يخطئ، ويمكنك طلب التحدث إلى شخص في أي وقت.", "كيف يمكننا مساعدتك؟"),
}


def first_words(spec: DeskSpec, language: str = "") -> tuple[str, str]:
    """Disclosure and greeting in `language` ("de", "de-AT"): as the business declares them in it, else ours in place of
    our default, else as they are in [desk]."""
    code = language.split("-")[0].lower()
    declared, fields = spec.languages.get(code), DeskSpec.model_fields
    ours = OURS.get(code, (spec.disclosure, spec.greeting))
    disclosure = ours[0] if spec.disclosure == fields["disclosure"].default else spec.disclosure
    greeting = ours[1] if spec.greeting == fields["greeting"].default else spec.greeting
    return (declared and declared.disclosure) or disclosure, (declared and declared.greeting) or greeting
