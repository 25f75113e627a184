r"""The letter that a response chooses, by one list of rules for every benchmark of multiple choice.

What is tagged or boxed comes first, where it names an option. Else, in the response without its marks:

1. the whole of it: a letter, an option's text, or both;
2. the last statement: "the answer is B", "Answer: B", "B is correct", "we choose (B)", "答案是B";
3. how it ends ("So B.", "Therefore, it is B.") or begins ("B. 42 N", a line "B"), where these agree;
4. the last sentence with a letter in brackets, where it holds one alone that nothing is said of.

A statement that names several letters, denies one, or is taken back ("wait") leaves the rest of the response to the
other rules. Options that the response writes down once more are passed over, so are the article "A" and the pronoun
"I". Where rules find nothing, a judge may; so they had rather find nothing than another letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from avar_lightning.benchmarks.answers import conclusion, stated, unmarked, without_adverbs
from avar_lightning.benchmarks.options import LETTERS, letter_of

Options = Mapping[str, str]
Extra = Callable[[str, Options], str | None]
MAX_READ = 20_000  # characters of a response, from its end
MAX_OPTION = 500  # characters of a sentence that may be an option's text

_IS = r"(?:is|was|should be|would be|must be|has to be|will be|can only be)"
_ADJECTIVE = r"(?:correct|right|best|final|chosen|appropriate)"
_OF = r"(?: (?:to|for|of) (?:the|this|that)(?: \w+){1,2}?)?"
_SAID = rf"(?:\s*[:=→]|\s*\n|\s+(?:{_IS}|are)\b\s*:?)"
_HEADS = re.compile(
    rf"\b(?:answers?|solution)\b{_OF}(?P<said>{_SAID})?"
    rf"|\b{_ADJECTIVE} (?:option|choice|letter|one)\b{_OF}(?P<said2>{_SAID})?"
    rf"|^(?:option|choice)(?P<said3>\s*:|\s+is\b)"
    r"|\b(?P<choosing>choose|select|pick|choosing|selecting|go with|opt for)\b"
    r"|(?P<chinese>答案(?:应该|应)?[是为选]?|选择?)\s*:?",
    re.IGNORECASE | re.MULTILINE,
)
_CHOSEN = re.compile(
    r"[\s,:]*(?:(?i:the|option|choice|letter|answer|then|thus|therefore|hence|indeed|most likely|[a-z]+ly|correct|"
    r"right)\b[\s,:]*)*(?P<bracket>\()?\s*(?:(?P<upper>[A-J])|(?P<lower>[a-j])(?=\s*(?:\)|[.,;:\n]|$)))\s*\)?"
    r"(?![A-Za-z0-9'’-])"
)
_IS_CORRECT = re.compile(
    r"(?:^|(?<=\n)|(?<=[.!?;,:] )|\b(?i:option|choice|answer|that|so|therefore|hence|thus) )\(?([A-J])\)?"
    rf" {_IS} (?:\w+ly |therefore |thus |indeed )?(?:the )?(?:only |most )?"
    rf"(?:{_ADJECTIVE} (?:answer|option|choice|one)\b|correct(?= because| since| as|,|;|\.|!|\n|$)|the answer\b)"
)
_DENIED = re.compile(r"[\s,:]*(?i:not|never|neither|nor|either|both|can ?not|can't|could|may|might|isn't|no)\b|\s*不")
_UNSAID = re.compile(
    r"(?i)(?:(?:\bnot|n't|\bnever|\bwrong|\bincorrect|\bfalse|\bwithout)\s+(?:\w+\s+)?|不|"
    r"\b(?:if|whether|suppose|assum\w+|unless|once|why)\s+(?:that\s+)?(?:the\s+)?(?:(?:correct|right|final)\s+)?)$"
)
_TAKEN_BACK = re.compile(r"(?i)\b(?:wait|hmm+|scratch that|on second thought|let me (?:re\w*|double)|correction)\b")
_AND_ANOTHER = re.compile(
    r"\s*(?:(?:or|and)\b|[/&及或和])\s*(?:option )?\(?[A-J](?![A-Za-z])|\s*,\s*\(?[A-J]\)?(?=\s*(?:,|and\b|or\b|\.|$))"
)
_PREDICATE = re.compile(
    r"(?i)\s*,?\s*(?:(?:which|that) )?(?:is|are|was|were|would|could|can|cannot|can't|does|doesn't|do|has|have|had|"
    r"seems?|looks?|gives?|needs?|shows?|requires?|being|too|isn't|says?|contains?|must|should|fits?)\b"
)
_AFTER_A_LETTER = re.compile(r"\s+(?!is\b|because\b|since\b|as\b|and\b|or\b|for\b|but\b|which\b|from\b|in\b)[a-z]")
_CLOSING = re.compile(
    rf"(?:(?:\b(?:it|this)(?: {_IS}|['’]s)|\b(?:so|thus|therefore|hence|consequently))[\s,:]*"
    rf"(?:(?:it|this) {_IS}\s*)?(?:the )?(?:{_ADJECTIVE} )?(?:(?:option|choice|answer) (?:is )?)?"
    r"|\b(?:corresponds? to|corresponding to|matches|match|which is|that is) (?:the )?(?:option|choice|answer) )"
    r"\(?([A-J])\)?(?![A-Za-z0-9'’-])",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?i)[\s,]*(?:because|since)\b")
_ITEM = re.compile(r"(?im)^\s*(?:[-•+]\s*)?(?:option )?\(?([A-J])[).:]\s*\S.*$")
_MARKER = re.compile(r"(?<![A-Za-z])\(?([A-J])[).:](?=\s)")
_BRACKETED = re.compile(r"\(([A-J])\)")
_BEFORE_BRACKET = re.compile(
    r"(?i)(?:^|[,:→]|\b(?:is|be|so|thus|therefore|hence|but|option|choice|choose|pick|select))\s*$"
)
_SENTENCES = re.compile(r"(?<=[.!?;])\s+|\n")


def choose(response: str, options: Options, *, first: Sequence[Extra] = (), last: Sequence[Extra] = ()) -> str | None:
    """The letter that a response chooses; None where rules find none.

    Args:
        response: What the model wrote, thinking included.
        options: Texts by letter; empty where they are not known, then any letter from A to J counts.
        first: A benchmark's own rules that come before these, of the conclusion without marks and the options.
        last: Those that come after these.

    >>> options = {"A": "3", "B": "4"}
    >>> choose("A square has four sides, so the answer is (B).", options), choose("A square is a square.", options)
    ('B', None)
    >>> choose("The answer is B, because option A is too small.", options), choose("The answer is A or B.", options)
    ('B', None)
    """
    text = unmarked(conclusion(response)[-MAX_READ:])
    plain = {letter: unmarked(option) for letter, option in options.items()}
    short = stated(response)
    found = _first(first, text, plain)
    if found is None and short is not None:
        found = letter_of(short, options) or _read(unmarked(short), plain, ())
    return found or _read(text, plain, last)


def statement(text: str, options: Options) -> tuple[str | None, str]:
    """The letter of the last statement in a text, and what the other rules may read where there is none.

    >>> statement("The answer is A. Wait, no. So B.", {})
    (None, 'Wait, no. So B.')
    """
    found, rest = None, text
    for start, end, letter in sorted(_statements(text, options)):
        if letter:
            found, rest = letter, text[end:]
        elif found is None or re.search(rf"\b{found}\b", _SENTENCES.split(text[start:], maxsplit=1)[0]):
            found, rest = None, "".join(_SENTENCES.split(text[end:], maxsplit=1)[1:])
    back = _TAKEN_BACK.search(rest) if found else None
    return (None, rest[back.start() :]) if back else (found, rest)


def prescribed_line(text: str, options: Options) -> str | None:
    """The letter behind the last `Answer:`, as a prompt asked for it."""
    _, found, after = text.rpartition("Answer:")
    return _chosen(after, options) or None if found else None


def without_items(text: str) -> str:
    """A text without the lines in which it writes down the options once more.

    >>> without_items("(A) a cat\\n(B) a dog\\nSo it is B.")
    'So it is B.'
    """
    items = list(_ITEM.finditer(text))
    return _ITEM.sub("", text).strip() if len({item[1].upper() for item in items}) > 1 else text


def is_word(text: str, letter: str, end: int) -> bool:
    """Whether a letter that ends there in a text is the article "A" or the pronoun "I"."""
    return letter in "AI" and _AFTER_A_LETTER.match(text, end) is not None


def _read(text: str, options: Options, last: Sequence[Extra]) -> str | None:
    text = without_items(text)
    whole = _whole(text, options)
    if whole is not None:
        return whole
    found, rest = statement(text, options)
    if found is not None:
        return found
    ends = {_closing(rest, options), _leading(rest, options) if rest == text else None} - {None}
    if ends:
        return ends.pop() if len(ends) == 1 else None
    return _bracketed(rest, options) or _first(last, rest, options)


def _first(rules: Sequence[Extra], text: str, options: Options) -> str | None:
    return next((found for rule in rules if (found := rule(text, options))), None)


def _whole(text: str, options: Options) -> str | None:
    """A letter or an option with hardly a word more: "B, being too small, is wrong" is no choice."""
    letter = letter_of(text, options)
    if letter is None:
        return None
    words = re.findall(r"\w+", text.casefold().replace(options.get(letter, "").casefold() or "\0", " "))
    return (
        letter
        if set(words) <= {"the", "final", "correct", "answer", "option", "choice", "is", letter.lower()}
        else None
    )


def _statements(text: str, options: Options) -> Iterator[tuple[int, int, str]]:
    """Where each statement begins and ends, with its letter; "" for one that leaves it open or denies one."""
    for head in _HEADS.finditer(text):
        said = any(head[name] for name in ("said", "said2", "said3", "chinese"))
        letter = _chosen(
            text[head.end() : head.end() + MAX_OPTION], options, bare=said, choosing=bool(head["choosing"])
        )
        if letter is not None:
            yield head.start(), head.end(), "" if _UNSAID.search(_before(text, head)) else letter
    for match in _IS_CORRECT.finditer(text):
        asked = re.match(r"[^.!?\n]*\?", text[match.end() :])
        if _is_option(match[1], options) and not asked and not _UNSAID.search(_before(text, match)):
            yield match.start(), match.end(), match[1]


def _chosen(tail: str, options: Options, *, bare: bool = True, choosing: bool = False) -> str | None:
    """The letter with which the rest of a statement begins, or whose option it says; "" for none or several, or one
    that is denied or asked; None where it is no statement on options."""
    tail = tail.lstrip(" \n").split("\n", 1)[0]
    if _DENIED.match(tail):
        return ""
    match = _CHOSEN.match(tail)
    letter = (match["upper"] or match["lower"].upper()) if match else ""
    if match is None or not _is_option(letter, options) or is_word(tail, letter, match.end()):
        sentence = without_adverbs(re.split(r"(?<=[^\s.])\.(?:\s|$)", tail, maxsplit=1)[0].strip())
        return letter_of(sentence, options) if bare and 1 < len(sentence) <= MAX_OPTION else None
    after = tail[match.end() :]
    if choosing and not (match["bracket"] or re.match(r"\s*(?:[.!]|$)", after) or _REASON.match(after)):
        return None
    if not bare and _PREDICATE.match(after):
        return None
    several = _AND_ANOTHER.match(after) or re.match(r"[^.!?\n]*\?", after) or _says_another(after, letter, options)
    return "" if several else letter


def _before(text: str, match: re.Match[str]) -> str:
    """As much of what stands before a match as tells whether it is denied; nothing of another line."""
    return text[max(0, match.start() - 40) : match.start()].rpartition("\n")[2]


def _is_option(letter: str, options: Options) -> bool:
    return letter in (options or LETTERS)


def _says_another(after: str, letter: str, options: Options) -> bool:
    """Whether the text of another option stands behind a letter."""
    said = after.strip(" ).:,-").casefold()
    own = options.get(letter, "").casefold()
    return not (own and said.startswith(own)) and any(
        option and re.match(rf"{re.escape(option.casefold())}(?!\w)", said) for option in options.values()
    )


def _ends_well(after: str, letter: str, options: Options) -> bool:
    """Whether nothing but the option's text or a reason stands behind a letter."""
    rest = after.strip(" ).:,-!")
    return not rest or _REASON.match(after) is not None or rest.casefold() == options.get(letter, "").casefold()


def _closing(text: str, options: Options) -> str | None:
    """The letter that the last sentence comes to, or that is the last line alone."""
    sentences = [part for part in _SENTENCES.split(text) if part.strip()]
    if not sentences:
        return None
    alone = re.fullmatch(r"\(?([A-J])\)?[.)]?", text.rsplit("\n", 1)[-1].strip())
    found = [alone] if alone else list(_CLOSING.finditer(sentences[-1]))
    if len({match[1] for match in found}) != 1:
        return None
    letter = found[-1][1]  # lower case would be the article
    after = "" if alone else sentences[-1][found[-1].end() :]
    return letter if _is_option(letter, options) and _ends_well(after, letter, options) else None


def _leading(text: str, options: Options) -> str | None:
    """The letter with which a response begins, like an item of a list or as a line of its own."""
    line = text.split("\n", 1)[0]
    found = re.match(r"\(?([A-J])(?:\)|[.:](?=\s)|\s*$)", line)
    if found is None or not _is_option(found[1], options):
        return None
    letter, after = found[1], line[found.end() :]
    others = {match[1] for match in _MARKER.finditer(after)} - {letter}
    wrong = others or _AND_ANOTHER.match(after) or _PREDICATE.match(after) or _says_another(after, letter, options)
    return None if wrong else letter


def _bracketed(text: str, options: Options) -> str | None:
    for sentence in reversed(_SENTENCES.split(text)):
        found = [
            match
            for match in _BRACKETED.finditer(sentence)
            if not _UNSAID.search(_before(sentence, match)) and not _PREDICATE.match(sentence, match.end())
        ]
        if not found:
            continue
        letter, match = found[-1][1], found[-1]
        alone = {other[1] for other in found} == {letter} and _is_option(letter, options)
        well = _BEFORE_BRACKET.search(_before(sentence, match)) and _ends_well(sentence[match.end() :], letter, options)
        return letter if alone and well else None
    return None
