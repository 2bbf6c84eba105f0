r"""Read units: which words after a number are a unit, what they measure, and their size in base units.

Only words in these tables are units: "5 squared" and "5 or seven" are not the number 5. `read` takes the text of a unit
(`\text{ km}/\text{h}`, `m/s^2`, `\text{square feet}`) and returns its dimension, as powers of base units, and a factor.
Two units are equal if both agree. Units of the same dimension can be converted (500 cm is 5 m).
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    dimension: frozenset[tuple[str, int]]  # base units with their powers; each counted thing is a base unit
    factor: Fraction

    def converts_to(self, other: "Unit") -> bool:
        return self.dimension == other.dimension


# Symbols that take a prefix (km, MHz, mL, keV): dimension in base units, and factor.
_SYMBOLS = {
    "m": ("m", 1), "g": ("g", 1), "s": ("s", 1), "A": ("A", 1), "K": ("K", 1), "mol": ("mol", 1),
    "L": ("m^3", "1/1000"),
    "l": ("m^3", "1/1000"), "Hz": ("s^-1", 1), "N": ("g m s^-2", 1000), "Pa": ("g m^-1 s^-2", 1000),
    "J": ("g m^2 s^-2", 1000), "W": ("g m^2 s^-3", 1000), "V": ("g m^2 s^-3 A^-1", 1000), "C": ("A s", 1),
    "F": ("A^2 s^4 g^-1 m^-2", "1/1000"), "T": ("g s^-2 A^-1", 1000), "eV": ("eV", 1), "cal": ("cal", 1),
    "pc": ("pc", 1), "bar": ("g m^-1 s^-2", 10**8), "Wh": ("g m^2 s^-2", 3600 * 1000), "B": ("byte", 1),
}  # fmt: skip
_PREFIXES = {
    "": 1, "T": 10**12, "G": 10**9, "M": 10**6, "k": 1000, "h": 100, "d": "1/10", "c": "1/100", "m": "1/1000",
    "µ": "1/1000000", "n": "1/1000000000", "p": "1/1000000000000", "f": "1/1000000000000000",
}  # fmt: skip
# Names and symbols that take no prefix: base units and factor. Plurals in -s are accepted too.
_NAMES = {
    "m": {"meter": 1, "metre": 1, "米": 1, "inch": "127/5000", "inches": "127/5000", "in": "127/5000",
          "foot": "381/1250", "feet": "381/1250", "ft": "381/1250", "yard": "1143/1250", "yd": "1143/1250",
          "mile": "1609344/1000", "mi": "1609344/1000", "厘米": "1/100", "千米": 1000, "公里": 1000, "毫米": "1/1000",
          "分米": "1/10", "angstrom": "1/10000000000", "Å": "1/10000000000", "micron": "1/1000000",
          "kilometer": 1000, "kilometre": 1000, "centimeter": "1/100", "centimetre": "1/100", "millimeter": "1/1000",
          "millimetre": "1/1000", "decimeter": "1/10", "nanometer": "1/1000000000", "micrometer": "1/1000000"},
    "g": {"gram": 1, "gramme": 1, "kilogram": 1000, "kilo": 1000, "milligram": "1/1000", "克": 1, "千克": 1000,
          "公斤": 1000, "tonne": 10**6, "ton": 10**6, "吨": 10**6, "pound": "45359237/100000", "lb": "45359237/100000",
          "ounce": "45359237/1600000", "oz": "45359237/1600000", "Kilogramm": 1000, "Gramm": 1},
    "s": {"second": 1, "sec": 1, "minute": 60, "min": 60, "hour": 3600, "hr": 3600, "h": 3600, "day": 86400,
          "week": 604800, "秒": 1, "分钟": 60, "小时": 3600, "天": 86400, "周": 604800, "millisecond": "1/1000",
          "Sekunde": 1, "Sekunden": 1, "Minute": 60, "Minuten": 60, "Stunde": 3600, "Stunden": 3600, "Tage": 86400,
          "heures": 3600, "horas": 3600, "minutos": 60, "segundos": 1},
    "month": {"month": 1, "year": 12, "yr": 12, "decade": 120, "century": 1200, "centuries": 1200, "年": 12, "月": 1,
              "岁": 12, "Jahre": 12},
    "dollar": {"dollar": 1, "$": 1, "USD": 1, "buck": 1, "cent": "1/100", "¢": "1/100", "penny": "1/100",
               "pennies": "1/100"},
    "euro": {"euro": 1, "Euro": 1, "€": 1, "EUR": 1}, "£": {"£": 1, "GBP": 1}, "¥": {"¥": 1, "yuan": 1, "元": 1,
    "RMB": 1, "CNY": 1}, "yen": {"yen": 1, "JPY": 1}, "₹": {"₹": 1, "rupee": 1, "Rs": 1, "INR": 1},
    "degree": {"degree": 1, "deg": 1, "°": 1, "度": 1},
    "celsius": {"°C": 1}, "fahrenheit": {"°F": 1}, "radian": {"radian": 1, "rad": 1},
    "percent": {"percent": 1, "percentage": 1},
    "m^2": {"hectare": 10000, "ha": 10000, "acre": "316160658/78125", "平方米": 1, "平方厘米": "1/10000"},
    "m^3": {"liter": "1/1000", "litre": "1/1000", "milliliter": "1/1000000", "millilitre": "1/1000000",
            "升": "1/1000", "毫升": "1/1000000", "立方米": 1, "立方厘米": "1/1000000", "cc": "1/1000000",
            "gallon": "473176473/125000000000", "gal": "473176473/125000000000", "quart": "473176473/500000000000",
            "pint": "473176473/1000000000000", "cup": "473176473/2000000000000"},
    "m s^-1": {"mph": "1397/3125", "kmph": "5/18", "kph": "5/18", "knot": "463/900"},
    "g m^2 s^-2": {"joule": 1000, "kilojoule": 10**6, "erg": "1/10000"}, "g m s^-2": {"newton": 1000, "dyne": "1/100"},
    "g m^2 s^-3": {"watt": 1000, "kilowatt": 10**6}, "g m^2 s^-3 A^-1": {"volt": 1000}, "A": {"ampere": 1, "amp": 1},
    "g m^2 s^-3 A^-2": {"ohm": 1000, "Ω": 1000}, "A s": {"coulomb": 1}, "s^-1": {"hertz": 1},
    "g m^-1 s^-2": {"pascal": 1000, "atm": 101325000}, "K": {"kelvin": 1}, "mol": {"mole": 1}, "cal": {"calorie": 1},
    "pc": {"parsec": 1}, "ly": {"ly": 1, "lightyear": 1}, "AU": {"AU": 1}, "byte": {"byte": 1}, "bit": {"bit": 1},
    "unit": {"unit": 1, "units": 1}, "M☉": {"M☉": 1}, "L☉": {"L☉": 1}, "R☉": {"R☉": 1}, "bps": {"bps": 1},
    "rpm": {"rpm": 1}, "rev": {"rev": 1, "revolution": 1}, "dB": {"dB": 1, "decibel": 1}, "amu": {"amu": 1, "u": 1},
    "M": {"M": 1, "molar": 1}, "G": {"G": 1, "gauss": 1}, "D": {"debye": 1}, "dyn": {"dyn": 1}, "sr": {"sr": 1},
    "ppm": {"ppm": 1}, "arcsec": {"arcsec": 1, "arcsecond": 1}, "arcmin": {"arcmin": 1, "arcminute": 1},
    "mas": {"mas": 1},
}  # fmt: skip
# Counted things from word problems, in the singular. Each one is a separate dimension.
_COUNTED_WORDS = """
    acorn action adult airplane album alligator angle animal answer ant apartment apple appointment area arm
    arrangement arrow article athlete attempt award baby backpack badge bag bagel bakery bale ball balloon banana
    band bandage bar barrel baseball basket basketball bat batch bean bear beaver bed bedroom bee beetle bell belt
    bench berry bicycle bike bill bird birthday biscuit blanket block blouse blueberry board boat bolt bone book
    bookmark bottle bouquet bowl box boy bracelet branch brand bread break brick bridge brother brownie bucket bug
    builder building bulb bunch bundle bunny bus bush business butterfly button cabbage cabinet cage cake calculator
    camper can candle candy cap car card carrot carton cartridge case cat cell chair chapter character check
    cheerleader cherry chick chicken chicks child chip chocolate choice chore circle city class classmate classroom
    client clip clock coat coconut coin color colour column combination committee competitor computer cone container
    cookie copy corn corner cost couch couple course court cousin cow crab cracker crate crayon credit cube cucumber
    cupcake curtain customer cut cycle daisy daughter deer desk diagonal diamond dice die digit dime dinner dish
    distribution divisor doctor dog doll dolphin donkey donut door dot dress drink drop drum duck duckling ear
    earring edge egg element elephant elf email employee engine envelope episode eraser essay exam experiment eye
    face factor fair family fan farm farmer father feather female fence file finger firefighter fish flag flavor
    flight floor flower fly folder follower fork fox fraction frame friend frog fruit fry function game garden gift
    giraffe girl glass glove goal goat gorilla grade grain grandchild grape group guard guest guitar gumball gun
    hair half-hour hamburger hamster hand handshake hat head heart helmet hen hike hit hole home horse hotdog hotel
    house individual ingredient insect instrument integer intersection invitation island issue item jacket jar jean
    jelly jellybean job journal jug jump kangaroo key kid kind kite kitten knife ladder lady ladybug lake lamb lamp
    lap laptop layer leaf leg lego lemon length lesson letter level lily line lion list litter lizard loaf lock log
    lollipop loop lunch machine magazine magnet male man mango marble mark marker marshmallow mask match matchstick
    matrix meal member message method mirror mistake mitten model monkey monster mother motorcycle mountain mouse
    mouth move movement movie muffin mug mushroom musician nail napkin necklace neighbor nest newspaper nickel night
    note notebook novel number nurse nut object octopus officer onion operation option orange orbit order outcome
    outfit owl oyster pack package page pail painting pair pan pancake panda panel paper paragraph parakeet parent
    parrot part participant partition party passenger patch path patient pattern peach peacock peanut pear pearl
    pebble pen pencil penguin pepper performer period permutation person petal phone photo photograph picture pie
    piece pig pigeon pile pill pillow pin pine pitch pizza place plan planet plank plant plate player poem point
    pole pony pool popsicle possibility poster pot potato present prize problem product program project puppet puppy
    purse puzzle quarter question rabbit race racer radish raffle raisin rat record rectangle region remainder
    reptile request result ribbon ride ring rock roll room rooster root rope rose round row rug rule run sack sailor
    sale salesman sample sandwich scarf school scientist score screen screw seagull seashell seat section seed
    segment sequence serving session set sheep sheet shelf shell ship shirt shoe shop shot shovel show shrimp
    sibling side sign sister skirt slice smartphone snack snail snake snowball snowman sock soda sofa soldier
    solution son song soup space spider spoon spot square squirrel stack stage stair stamp star state station stem
    step stick sticker stitch stone stool stop store story straw strawberry stripe student subject subset success
    suit suitcase swan sweater swimmer symbol table tablespoon tablet tank task teacher team tear teaspoon
    television tent term test text thing throw ticket tie tiger tile time tin tire toe token tomato tool tooth
    toothbrush toothpick topping towel tower town toy track train trapezoid tray treat tree trial triangle trip
    trophy truck trumpet tube tulip turkey turn turtle twin type umbrella unicorn uniform user value van variable
    vase vegetable vehicle vertex video visit visitor vote vowel wall walnut watch watermelon wave way wedding whale
    wheel win window wing winner wire wolf woman word worker workout worksheet world worm wrap yogurt zebra zero
    äpfel kinder personen leute eier bücher pommes personnes livres élèves manzanas personas libros niños
"""
_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "teeth": "tooth",
    "knives": "knife", "leaves": "leaf", "loaves": "loaf", "shelves": "shelf", "wolves": "wolf", "sheaves": "sheaf",
    "geese": "goose", "vertices": "vertex", "matrices": "matrix", "scarves": "scarf", "kids": "child", "kid": "child",
    "persons": "person", "人": "person", "个": "thing", "只": "thing", "本": "thing", "things": "thing", "elves": "elf",
}  # fmt: skip
# Words before a counted thing that do not change it. "square" and "cubic" (below) raise what follows to a power.
_ADJECTIVE_WORDS = """total different distinct possible red blue green yellow white black brown new small large big
    positive negative real whole full ordinary such of the a an all altogether each average
    remaining left ordered additional extra unique valid linear regular US
    American solar old approximately approx about"""
_COUNTED, _ADJECTIVES = set(_COUNTED_WORDS.lower().split()), set(_ADJECTIVE_WORDS.split())
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}

_TOKEN = re.compile(
    r"\s*+(?:\^\s*+\{?\s*+(?P<power>[+-]?\d{1,2})\s*+\}?|(?P<per>/|per\b)|(?P<dot>\*|\\cdot(?![A-Za-z])|·|-)"
    r"|(?P<word>°\s?[CF](?![A-Za-z])|(?:[^\W\d_]|[☉µ])++|[$€£¥₹°¢]))"
)
_WRAPPERS = re.compile(r"\\(?:text|mathrm|rm|operatorname)(?![A-Za-z])|(?<!\^)(?<!\^ )[{}]|\\[,;!]|\.(?!\d)|\(|\)")
_BALANCED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+"  # two levels of braces
_SYMBOLS_OF_LATEX = (
    (re.compile(r"(?:\\mu(?![A-Za-z])|μ)\s*+(\\(?:text|mathrm)\s*+\{)?\s*+"), r"\1µ"),
    (re.compile(r"_\s*+(?:\{\s*+\\odot\s*+\}|\\odot)"), "☉"),
    (re.compile(r"\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ)|\\degrees?(?![A-Za-z])|\\circ(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:Omega|ohm)(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\(?:AA|r\s*+A)(?![A-Za-z])"), "Å"),
    (re.compile(rf"\\frac\s*+\{{({_BALANCED})\}}\s*+\{{({_BALANCED})\}}"), r"\1/\2"),
    (re.compile(r"\\\$"), "$"),
)


def _words() -> dict[str, Unit]:
    table = {}
    for dimension, names in _NAMES.items():
        base = _dimension(dimension)
        for name, factor in names.items():
            for form in (name, name + "s") if len(name) > 2 and name.isascii() else (name,):
                table[form] = Unit(base, Fraction(factor))
    for symbol, (dimension, factor) in _SYMBOLS.items():
        for prefix, scale in _PREFIXES.items():
            table.setdefault(prefix + symbol, Unit(_dimension(dimension), Fraction(factor) * Fraction(scale)))
    return table


def _dimension(text: str) -> frozenset[tuple[str, int]]:
    pairs = (part.partition("^") for part in text.split())
    return frozenset((base, int(power or 1)) for base, _, power in pairs)


_TABLE = _words()


@lru_cache(maxsize=4096)
def read(text: str) -> Unit | None:
    """Return the unit that the text means; None if any part of it is not a unit."""
    for pattern, replacement in _SYMBOLS_OF_LATEX:
        text = pattern.sub(replacement, text)
    text = _WRAPPERS.sub(" ", text)
    dimension, factor, sign, power = Counter(), Fraction(1), 1, 1
    last: Unit | None = None
    position, found = 0, False

    def add(unit: Unit, times: int) -> None:
        nonlocal factor
        for base, exponent in unit.dimension:
            dimension[base] += exponent * times
        factor *= unit.factor**times

    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        position = match.end()
        if match["power"]:
            if last is None or abs(int(match["power"])) > 9:
                return None
            add(last, sign * (int(match["power"]) - 1))
            last = None
        elif match["per"]:
            sign, last = -1, None
        elif match["word"]:
            word = re.sub(r"\s", "", match["word"])
            if word in ("squared", "cubed"):
                if last is None:
                    return None
                add(last, sign * (_POWERS[word] - 1))
                last = None
            elif word.lower() in _POWERS:
                power = _POWERS[word.lower()]
            elif word in _ADJECTIVES:
                last = None
            else:
                last = word_unit(word)
                if last is None:
                    return None
                add(last, sign * power)
                power, found = 1, True
    if not found or power != 1:
        return None
    return Unit(frozenset((base, exponent) for base, exponent in dimension.items() if exponent), factor)


def word_unit(word: str) -> Unit | None:
    """Return the unit that a word means: a unit of measure (as written or in lower case) or a counted thing."""
    unit = _TABLE.get(word) or (_TABLE.get(word.lower()) if len(word) > 3 else None)
    if unit:
        return unit
    thing = singular(word.lower())
    return Unit(frozenset({(thing, 1)}), Fraction(1)) if thing in _COUNTED or word in _IRREGULAR else None


def singular(word: str) -> str:
    """Return the singular of an English word."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("s") and word[:-1] in _COUNTED:
        return word[:-1]
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss"), ("oes", "o")):
        if word.endswith(ending) and len(word) > 4:
            return word[: -len(ending)] + instead
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
