"""Sentences by grammar: stories, letters, questions and answers, descriptions, instructions, and phrases side by side in several languages."""

from __future__ import annotations

from dealing import Dealer

NAMES = [
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Katya",
    "Liam",
    "Mirela",
    "Noor",
    "Otto",
    "Priya",
    "Quentin",
    "Rosa",
    "Samir",
    "Tove",
    "Uma",
    "Viktor",
    "Wanda",
    "Ximena",
    "Yusuf",
    "Zoe",
]
PLACES = [
    "the harbour",
    "the reading room",
    "the old station",
    "the greenhouse",
    "a rented kitchen",
    "the north slope",
    "the archive",
    "the ferry",
    "the courtyard",
    "a workshop behind the school",
    "the observatory",
    "the market hall",
]
THINGS = [
    "a brass key",
    "the second notebook",
    "an unsigned letter",
    "a broken radio",
    "three apples",
    "a map without names",
    "the spare lamp",
    "a box of slides",
    "the missing page",
    "a wooden flute",
    "a receipt from 1987",
    "two tickets",
]
ACTS = [
    "found",
    "hid",
    "repaired",
    "gave away",
    "photographed",
    "forgot",
    "asked for",
    "wrapped in newspaper",
    "weighed twice",
    "carried home",
    "drew from memory",
    "sold",
]
TIMES = [
    "On the first warm day of the year",
    "Shortly before midnight",
    "While the others were asleep",
    "After the meeting",
    "In the week of the storm",
    "An hour too late",
    "Long before anyone noticed",
    "At the usual time",
    "When the power failed",
    "Between two trains",
]
TURNS = [
    "Nobody believed it.",
    "It was not the last time.",
    "The dog knew, of course.",
    "This changed less than one might think.",
    "There was a pause in which a clock could be heard.",
    "What happened next is not in the report.",
    "Even so, the door stayed open.",
    "It rained, as it does in such stories.",
    "Somebody laughed, then stopped.",
    "The answer came by post, nine days later.",
]
SAID = ["said", "asked", "whispered", "repeated", "wrote in the margin", "insisted", "admitted"]
QUOTES = [
    "I would do it again",
    "You have it the wrong way round",
    "There were only two of them",
    "Nothing was missing",
    "It is heavier than it looks",
    "We never agreed on a price",
    "Ask me tomorrow",
    "The lock had been changed",
    "That is not my handwriting",
]
TOPICS = [
    "the rate of an outgoing tide",
    "how glass is made",
    "the number of bones in the hand",
    "why bridges hum in the wind",
    "the pricing of olive oil",
    "the migration of storks",
    "paper sizes",
    "the history of the zip fastener",
    "soil that holds too much water",
    "the tuning of a piano",
]
REASONS = [
    "the forces on both sides cancel",
    "small differences add up over a long time",
    "people measure what is easy to measure",
    "heat moves towards what is colder",
    "the cheapest material is rarely the lightest",
    "each step depends on the one before",
    "there is no single owner of the problem",
    "the sample was too small to tell",
]


def story(deal: Dealer) -> str:
    """A paragraph about somebody, somewhere."""
    first, second = deal.some(NAMES, 2)
    lines = []
    for _ in range(deal.number(2, 4)):
        shape = deal.below(4)
        if shape == 0:
            lines.append(f"{deal.one(TIMES)}, {first} {deal.one(ACTS)} {deal.one(THINGS)} in {deal.one(PLACES)}.")
        elif shape == 1:
            lines.append(f'"{deal.one(QUOTES)}," {deal.one(SAID)} {second}, who had come from {deal.one(PLACES)} with {deal.one(THINGS)}.')
        elif shape == 2:
            lines.append(
                f"{second} {deal.one(ACTS)} {deal.one(THINGS)}, though {first} had {deal.one(['never', 'twice', 'only once', 'always'])} been to {deal.one(PLACES)}."
            )
        else:
            lines.append(deal.one(TURNS))
    return " ".join(lines)


def letter(deal: Dealer) -> str:
    sender, receiver = deal.some(NAMES, 2)
    number, amount = deal.number(1000, 9999), deal.number(500, 90000) / 100
    body = deal.one(
        [
            f"your order no. {number} left our store on {deal.number(1, 28)} May and should reach you within {deal.number(2, 9)} working days. The invoice over {amount:.2f} euros is enclosed.",
            f"I am writing about the room in {deal.one(PLACES)}. We would need it for {deal.number(8, 60)} people, with chairs but without tables. Would {amount:.2f} be acceptable?",
            f"please find attached the figures for quarter {deal.number(1, 4)}. Costs rose by {deal.number(1, 19)} per cent, mainly because of transport; page {deal.number(2, 40)} has the details.",
            f"thank you for the talk on {deal.one(TOPICS)}. Two of us disagreed afterwards about whether {deal.one(REASONS)}, and we should like to hear your view.",
        ]
    )
    return f"Dear {receiver},\n{body}\n{deal.one(['Kind regards', 'Yours sincerely', 'Best wishes', 'See you soon'])}\n{sender}"


def answers(deal: Dealer) -> str:
    """Questions with right answers."""
    kilometres, grams, base = deal.number(2, 90), deal.number(1, 40) * 50, deal.number(2, 30)
    word = deal.one(["lantern", "gravity", "orchard", "syntax", "harvest", "quantum", "velvet", "notebook", "parallel", "mountain"])
    asked = deal.some(
        [
            (f"How many metres are {kilometres} kilometres?", f"{kilometres} kilometres are {kilometres * 1000} metres."),
            (
                f"A bag holds {grams} grams. How much do {base} bags hold?",
                f"{base} times {grams} grams is {base * grams} grams, or {base * grams / 1000:g} kilograms.",
            ),
            (f"Spell '{word}' backwards.", f"It is '{word[::-1]}'."),
            (f"How many letters has the word '{word}'?", f"It has {len(word)}."),
            (f"What is {base} squared, and is it even?", f"{base} squared is {base * base}, which is {'even' if base % 2 == 0 else 'odd'}."),
            (f"What should I know about {deal.one(TOPICS)}?", f"Above all that {deal.one(REASONS)}. The rest follows, though not at once."),
            (f"Is it true that {deal.one(REASONS)}?", f"Often, but not always; it depends on {deal.one(TOPICS)}."),
        ],
        deal.number(2, 3),
    )
    return "\n".join(f"{deal_name}: {text}" for question, answer in asked for deal_name, text in (("User", question), ("Assistant", answer)))


def encyclopedia(deal: Dealer) -> str:
    """A made-up place with numbers that agree."""
    town = deal.one(["Var", "Ost", "Kel", "Mira", "Tor", "Belu", "San", "Nor"]) + deal.one(["holm", "mar", "grad", "via", "ton", "essa", "dal", "wick"])
    people, square = deal.number(3, 900) * 100, deal.number(5, 90)
    year = deal.number(1120, 1890)
    return (
        f"{town} is a town of {people:,} inhabitants on the {deal.one(['left', 'right'])} bank of the {deal.one(['Ilse', 'Morava', 'Tay', 'Drin', 'Oder'])}. It covers {square} square "
        f"kilometres, so that about {people // square} people live on each of them. First mentioned in {year}, it received its charter {deal.number(12, 140)} years later and lived from "
        f"{deal.one(['salt', 'timber', 'wool', 'printing', 'glass', 'tolls'])} until the railway came. {deal.one(['Its bridge', 'The town hall', 'The lower mill', 'A chapel'])} was rebuilt after the "
        f"{deal.one(['fire', 'flood', 'earthquake'])} of {year + deal.number(150, 220)}. Scholars still discuss {deal.one(TOPICS)} there, since {deal.one(REASONS)}."
    )


def manual(deal: Dealer) -> str:
    """Numbered instructions."""
    steps = deal.some(
        [
            "Switch off the main valve and wait until the pressure has fallen to zero.",
            "Remove the four screws on the back; keep them apart, they are not of equal length.",
            "Clean the filter with lukewarm water. Do not use solvents.",
            "Check that the seal lies flat in its groove.",
            "Tighten the screws crosswise to 12 Nm.",
            "Open the valve slowly and look for drops.",
            "Write date and reading on the card.",
            "Press and hold both buttons for five seconds until the lamp blinks green.",
            "If the lamp stays red, begin again at the first step.",
            "Dispose of the old cartridge as the law of your country asks.",
        ],
        deal.number(3, 5),
    )
    return f"{deal.one(['Maintenance', 'Before first use', 'Replacing the cartridge', 'After a long pause'])}\n" + "\n".join(
        f"{number}. {step}" for number, step in enumerate(steps, 1)
    )


_SUBJECTS = [
    ("the cat", "die Katze", "le chat", "el gato", "il gatto", "o gato", "de kat"),
    ("the teacher", "der Lehrer", "le professeur", "el profesor", "il professore", "o professor", "de leraar"),
    ("the child", "das Kind", "l'enfant", "el niño", "il bambino", "a criança", "het kind"),
    ("my sister", "meine Schwester", "ma sœur", "mi hermana", "mia sorella", "a minha irmã", "mijn zus"),
    ("the doctor", "die Ärztin", "le médecin", "la médica", "la dottoressa", "a médica", "de dokter"),
    ("the farmer", "der Bauer", "le fermier", "el granjero", "il contadino", "o agricultor", "de boer"),
]
_VERBS = [
    ("sees", "sieht", "voit", "ve", "vede", "vê", "ziet"),
    ("is looking for", "sucht", "cherche", "busca", "cerca", "procura", "zoekt"),
    ("buys", "kauft", "achète", "compra", "compra", "compra", "koopt"),
    ("forgets", "vergisst", "oublie", "olvida", "dimentica", "esquece", "vergeet"),
    ("draws", "zeichnet", "dessine", "dibuja", "disegna", "desenha", "tekent"),
]
_OBJECTS = [
    ("the house", "das Haus", "la maison", "la casa", "la casa", "a casa", "het huis"),
    ("a red bicycle", "ein rotes Fahrrad", "un vélo rouge", "una bicicleta roja", "una bicicletta rossa", "uma bicicleta vermelha", "een rode fiets"),
    ("the bread", "das Brot", "le pain", "el pan", "il pane", "o pão", "het brood"),
    ("two books", "zwei Bücher", "deux livres", "dos libros", "due libri", "dois livros", "twee boeken"),
    ("the bridge", "die Brücke", "le pont", "el puente", "il ponte", "a ponte", "de brug"),
]
_WHEN = [
    ("today", "heute", "aujourd'hui", "hoy", "oggi", "hoje", "vandaag"),
    ("every morning", "jeden Morgen", "chaque matin", "cada mañana", "ogni mattina", "todas as manhãs", "elke ochtend"),
    ("again", "wieder", "encore", "otra vez", "di nuovo", "outra vez", "weer"),
]


def phrases(deal: Dealer) -> str:
    """One simple sentence in three of seven languages, word by word the same."""
    parts = (deal.one(_SUBJECTS), deal.one(_VERBS), deal.one(_OBJECTS), deal.one(_WHEN))
    lines = []
    for language in deal.some(range(7), 3):
        subject, verb, thing, when = (part[language] for part in parts)
        ordered = f"{subject} {verb} {when} {thing}" if language in (1, 6) else f"{subject} {verb} {thing} {when}"
        lines.append(("English", "Deutsch", "Français", "Español", "Italiano", "Português", "Nederlands")[language] + f": {ordered[0].upper()}{ordered[1:]}.")
    return "\n".join(lines)
