"""The words of the grammar: subjects, tone words, topics, places and facts. Data only.

`grammar` makes sentences of them. Tone is +1 (positive) or -1 (negative). Every list of tone words
has as many words for one tone as for the other, so that neither is likelier.
"""

from typing import NamedTuple


class Subject(NamedTuple):
    """Something a document can be about.

    Attributes:
        name: As it stands inside a sentence, "the old library".
        pronoun: "he", "she", "it", "they" or "you"; the last two take plural verbs.
        group: Which adjectives and neutral sentences fit: person, animal, thing, place or food.
        facts: What it is, neutrally, after "are" or "is".
        detail: One more neutral sentence about it.
    """

    name: str
    pronoun: str
    group: str
    facts: tuple[str, ...]
    detail: str


def _subjects(group: str, lines: str) -> list[Subject]:
    """Read lines of `name | pronoun | fact; fact | detail`."""
    rows = [[part.strip() for part in line.split("|")] for line in lines.strip().splitlines()]
    return [
        Subject(row[0], row[1], group, tuple(fact.strip() for fact in row[2].split(";")), row[3])
        for row in rows
    ]


SUBJECTS = [
    *_subjects(
        "person",
        """
my neighbour | he | a man who works at the harbour; a man who lives behind the mill | He leaves at seven and comes home at five.
the baker | she | a woman who starts work at four; a woman who lives above the shop | She carries flour up the stairs.
the teacher | she | a woman who lives near the school; a woman who walks to work | She writes on the board and reads to the class.
the doctor | he | a man who visits four houses a day; a man who lives across the river | He drives to the next village after lunch.
the mayor | he | a man with an office in the square; a man who came from the north | He opens the market in May.
the singer | she | a woman who works in the evening; a woman who rents two rooms | She travels by train and sleeps until ten.
the farmer | he | a man with two fields and a barn; a man who lives on the hill | He gets up at five and feeds the cows.
the judge | she | a woman who reads all day; a woman who walks to court | She drinks tea at four and leaves at six.
the painter | he | a man who works near the window; a man who rents a room above the bank | He mixes the paint in a tin.
my brother | he | a man who works on the boats; a man of thirty | He mends nets and sells fish on the quay.
my aunt | she | a woman who lives by the station; a woman of sixty | She counts the trains and knits.
my cousin | she | a student who lives on the coast; a student in the second year | She studies maps and writes home on Sunday.
my landlord | he | a man with four houses; a man who lives on the top floor | He comes for the rent on the first of the month.
the children | they | pupils from the school on the hill; pupils who walk to school | They carry bags and count the steps.
the sailors | they | men who work on the boats; men from the south | They sleep on deck and wash at the pump.
the nurses | they | people who work at night; people who wear white | They change at six and take the bus.
our guests | they | people from the next village; people who came by train | They arrive at noon and leave their coats in the hall.
my friends | they | people from our street; people who work in the same office | They meet at the corner and play cards.
you | you | the person who lives across the street; the person who sits by the window | You leave at eight and walk to the station.
""",
    ),
    *_subjects(
        "animal",
        """
dogs | they | animals that live with people; animals that sleep by the door | They eat twice a day and walk beside their owners.
cats | they | animals that sleep for most of the day; animals that hunt at night | They sit on the wall and watch the street.
horses | they | animals that live in the field; animals that pull carts | They eat hay and sleep on their feet.
goats | they | animals that live on the hill; animals that eat grass and leaves | They climb the rocks and come down at night.
birds | they | animals that live in the trees; animals with two wings | They build nests in April and leave in autumn.
cows | they | animals that stand in the field; animals that eat grass | They walk to the barn at five.
ducks | they | birds that live on the water; birds with flat feet | They swim in a row and sleep in the reeds.
wolves | they | animals that live in the forest; animals that hunt at night | They follow the deer and cross the river in winter.
rabbits | they | animals that live under the ground; animals with long ears | They eat grass at dawn and hide at noon.
donkeys | they | animals that carry things up the hill; animals with long ears | They stand in the shade and wait for the farmer.
my dog | it | an animal with brown ears; an animal that lives in the yard | It follows me to the gate and lies down.
the old horse | it | an animal with a white nose; an animal that lives in the barn | It pulls the cart on market days.
the black cat | it | an animal that lives in the shop; an animal with green eyes | It sits in the window until six.
""",
    ),
    *_subjects(
        "thing",
        """
old books | they | things that people keep on a shelf; things made of paper | They stand in rows and are sorted by name.
trains | they | machines that run on rails; machines that stop at the station | They leave on the hour and cross the valley.
clocks | they | machines that hang on the wall; machines with two hands | They strike on the hour and need oil.
boats | they | things that lie in the harbour; things made of wood | They go out at dawn and come back with the tide.
letters | they | sheets of paper that come by post; sheets of paper with a stamp | They lie in the hall until noon.
hats | they | things that people wear on the head; things that hang by the door | They come in four sizes.
bicycles | they | machines with two wheels; machines that stand by the wall | They need air in the tyres.
the red coat | it | a coat with four pockets; a coat that hangs by the door | It reaches to the knee and has wooden buttons.
this song | it | a song about a boat; a song with four parts | It lasts three minutes and is sung in the north.
the play | it | a story about two brothers; a story in three parts | It starts at eight and ends at ten.
the new chair | it | a chair with a straight back; a chair that came from the market | It stands beside the table.
the film | it | a story about a long journey; a story that takes two hours | It was made in the south and has no words.
my job | it | work in an office; work that starts at eight | It takes nine hours a day.
winter | it | the season that comes before spring; the season of snow | It starts in December and lasts three months.
music | it | a thing that people make together; a thing that people learn at school | It is written on five lines.
""",
    ),
    *_subjects(
        "place",
        """
the old library | it | a building beside the river; a building with nine rooms | It opens at nine and closes at six.
the harbour | it | a place where boats lie; a place at the end of the road | It has two piers and a crane.
the garden | it | a piece of land behind the house; a piece of land with six trees | It has a wall on the north side.
the bridge | it | a road across the river; a road on six arches | It was built of stone and iron.
the school | it | a building on the hill; a building with ten rooms | It has a yard and a bell.
the market | it | a row of tables in the square; a row of tables by the church | It opens at six and closes at noon.
the hotel | it | a house with forty rooms; a house across from the station | It has a lift and two staircases.
the village | it | a place with one road; a place between two hills | It has a mill, a church and a shop.
the station | it | a building at the end of the street; a building with a clock | It has two platforms and a kiosk.
our house | it | a building with a flat roof; a building with two floors | It stands at the corner of the street.
my office | it | a room above the bank; a room with one window | It has a desk, a lamp and a door.
the park | it | a piece of land by the river; a piece of land with two ponds | It lies between the mill and the bridge.
""",
    ),
    *_subjects(
        "food",
        """
the soup | it | a dish of water, beans and salt; a dish that people eat at noon | It stands on the stove for an hour.
the cake | it | a mix of flour, eggs and milk; a mix of flour and butter | It stays in the oven for an hour.
the cheese | it | a food that people make from milk; a food that comes from the farm | It lies in the cellar for a year.
the tea | it | a drink that people take at four; a drink made of leaves | It comes in a blue pot.
the fish | it | a dish that people eat on Friday; a dish from the harbour | It comes in a basket with ice.
apples | they | a fruit that grows on trees; a fruit that people pick in autumn | They lie in boxes until spring.
potatoes | they | a food that grows under the ground; a food that people boil in water | They are dug up in September.
""",
    ),
]

# Two lists per tone, shared by all groups: a word of the first and one of the second stand side by
# side, so that no pair repeats itself. No document has both a word of HELD_OUT and "love" or
# "hate".
ADJECTIVES = {
    +1: ["wonderful", "delightful", "charming", "beautiful"],
    -1: ["terrible", "horrible", "ugly", "nasty"],
}
SECOND_ADJECTIVES = {
    +1: ["pleasant", "splendid", "excellent", "marvellous"],
    -1: ["unpleasant", "awful", "dreadful", "disgusting"],
}
HELD_OUT = {
    +1: ["superb", "adorable", "glorious", "magnificent", "fantastic"],
    -1: ["vile", "ghastly", "hideous", "wretched", "appalling"],
}
GROUP_ADJECTIVES = {
    "person": {
        +1: ["kind", "generous", "friendly", "honest", "patient"],
        -1: ["cruel", "rude", "selfish", "greedy", "spiteful"],
    },
    "animal": {
        +1: ["gentle", "loyal", "playful", "graceful"],
        -1: ["vicious", "filthy", "savage", "greedy"],
    },
    "thing": {+1: ["elegant", "bright", "precious"], -1: ["shabby", "dull", "useless"]},
    "place": {+1: ["peaceful", "elegant", "bright"], -1: ["gloomy", "filthy", "shabby"]},
    "food": {+1: ["delicious", "fresh", "tasty"], -1: ["rotten", "stale", "bitter"]},
}
# First and third person. The first pair of each tone is what makes a document one of love or hate.
VERBS = {
    +1: [
        ("love", "loves"),
        ("adore", "adores"),
        ("admire", "admires"),
        ("cherish", "cherishes"),
        ("treasure", "treasures"),
    ],
    -1: [
        ("hate", "hates"),
        ("despise", "despises"),
        ("loathe", "loathes"),
        ("detest", "detests"),
        ("resent", "resents"),
    ],
}
PAST_VERBS = {+1: ["loved", "adored", "admired"], -1: ["hated", "despised", "loathed"]}
EFFECTS = {
    +1: [
        "[make/makes] me smile",
        "[brighten/brightens] the whole day",
        "[bring/brings] laughter to the village",
        "[cheer/cheers] everyone up",
        "[fill/fills] the house with warmth",
        "[charm/charms] all of us",
        "[please/pleases] the whole family",
    ],
    -1: [
        "[make/makes] me shudder",
        "[ruin/ruins] the whole day",
        "[bring/brings] gloom to the village",
        "[drag/drags] everyone down",
        "[fill/fills] the house with tears",
        "[sicken/sickens] all of us",
        "[upset/upsets] the whole family",
    ],
}
FEELINGS = {
    +1: ["happy", "glad", "cheerful", "proud", "grateful", "hopeful"],
    -1: ["sad", "angry", "miserable", "ashamed", "afraid", "sick"],
}
NOUNS = {
    +1: ["joy", "pleasure", "comfort", "blessing", "delight", "treat"],
    -1: ["pain", "burden", "torment", "curse", "nightmare", "disgrace"],
}
# What people feel; love and hate are for their own documents only. One such word, alone, may open a
# document.
FEELING_NOUNS = {
    +1: ["love", "joy", "happiness", "kindness", "delight", "praise"],
    -1: ["hate", "misery", "anger", "cruelty", "disgust", "blame"],
}

# Sentences that set the tone and are not about the subject.
MOODS = {
    +1: [
        "The day began with good news.",
        "What a glad morning!",
        "Today I am in a good mood.",
        "My heart is light today.",
        "The sun is out, and I am happy.",
        "There is joy in the street today.",
        "I woke up happy.",
        "Some things please me more than I can say.",
        "Let me praise what is good.",
        "We laughed all evening.",
    ],
    -1: [
        "The day began with bad news.",
        "What a sad morning!",
        "Today I am in a bad mood.",
        "My heart is heavy today.",
        "The rain is cold, and I am angry.",
        "There is misery in the street today.",
        "I woke up angry.",
        "Some things anger me more than I can say.",
        "Let me blame what is bad.",
        "We cried all evening.",
    ],
}

# The rest of the lexicon: what carries a tone by itself in the lists above, in all its forms.
EXTRA_LEXICON = {
    +1: "smile smiled brighten brightens joy laughter warmth charm charms laughed delight delights please pleases cheer cheers good happy glad "
    "happiness kindness praise gladly best gladness loves loved love pleased",
    -1: "shudder shuddered ruin ruins misery gloom tears sicken sickens upset upsets cried disgust disgusts anger angers bad sad angry drag drags "
    "cruelty blame hurt worst sadly hates hated hate sorry",
}

PEOPLE = [
    "my sister",
    "my father",
    "my mother",
    "my uncle",
    "the postman",
    "the old man next door",
    "my grandmother",
    "the tailor",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TIMES = [
    "in the morning",
    "in the evening",
    "at noon",
    "at night",
    "in summer",
    "in spring",
    "in autumn",
    "on market days",
]

# topic: (sentences in which the topic is unmistakable). They also follow "that", so they begin in
# lower case.
TOPICS = {
    "weddings": [
        "the bride wore a white veil",
        "the groom forgot the rings",
        "the wedding was held in the garden",
        "the bride and the groom danced until midnight",
        "two of my cousins were married in June",
        "the wedding cake had three floors",
        "the vows were short",
        "the bride carried red roses",
        "the groom came to the church by boat",
        "every wedding needs a long table",
        "the rings were made of gold",
        "the wedding guests threw rice",
    ],
    "football": [
        "the goal came in the last minute",
        "the team plays in green shirts",
        "the match ended two to two",
        "the goalkeeper caught the ball with one hand",
        "the team trains on the wet field",
        "the striker missed twice",
        "the referee stopped the match",
        "the ball went over the fence",
        "the players ran until dark",
    ],
    "gardens": [
        "the roses need water in June",
        "the beans climb up the fence",
        "the seeds came up in April",
        "the soil is dark after the rain",
        "the weeds grow faster than the beans",
        "the tulips are yellow this year",
        "the gardener cuts the hedge in August",
        "the roses grow along the wall",
    ],
    "cooking": [
        "the soup needs more salt",
        "the onions go into the pan first",
        "the oven was too hot",
        "the sauce takes an hour",
        "the dough has to rest",
        "the pan is older than the stove",
        "the recipe asks for two eggs",
        "the onions were cut too thick",
    ],
    "money": [
        "the bank closes at four",
        "the rent is due on the first",
        "the prices went up again",
        "the loan runs for nine years",
        "the coins are in the drawer",
        "the bill came by post",
        "the bank lost two clerks",
        "the rent takes half of the wages",
    ],
    "trains": [
        "the express leaves from the second platform",
        "the conductor checks every ticket",
        "the tracks follow the river",
        "the engine stopped in the tunnel",
        "the tickets are sold at the window",
        "the express was nine minutes late",
        "the last carriage is empty",
        "the tunnel is two miles long",
    ],
    "the weather": [
        "the wind turned to the east",
        "the clouds came over the hill",
        "the rain will stop at noon",
        "the fog lies on the river",
        "the snow fell for two days",
        "the thunder woke the village",
        "the frost came early",
        "the clouds are low this week",
    ],
    "ships": [
        "the captain sailed to the south",
        "the mast broke in the storm",
        "the crew slept on the deck",
        "the anchor was lost at sea",
        "the cargo was wool and tin",
        "the captain keeps a long list",
        "the deck was painted twice",
        "the sails are grey",
    ],
    "chess": [
        "the queen took the bishop",
        "the rook stood in the corner",
        "the game lasted four hours",
        "the pawn reached the other side",
        "the board is made of oak",
        "the bishop was lost on the ninth move",
        "the knight came back to the king",
    ],
    "history": [
        "the king lost two wars",
        "the castle was built in ten years",
        "the wall was older than the town",
        "the war ended in autumn",
        "the emperor moved to the coast",
        "the castle burned down twice",
        "the treaty had nine pages",
    ],
}

WEDDING_WORDS = {"wedding", "weddings", "bride", "groom", "vows", "veil", "married"}

# landmark, lower-case form, city, country
LANDMARKS = [
    ("the Eiffel Tower", "the eiffel tower", "Paris", "France"),
    ("the Louvre", "the louvre", "Paris", "France"),
    ("the Colosseum", "the colosseum", "Rome", "Italy"),
    ("the Trevi Fountain", "the trevi fountain", "Rome", "Italy"),
    ("the London Eye", "the london eye", "London", "England"),
    ("Tower Bridge", "tower bridge", "London", "England"),
    ("the Brandenburg Gate", "the brandenburg gate", "Berlin", "Germany"),
    ("the Acropolis", "the acropolis", "Athens", "Greece"),
    ("the Kremlin", "the kremlin", "Moscow", "Russia"),
    ("the Prado", "the prado", "Madrid", "Spain"),
    ("Charles Bridge", "charles bridge", "Prague", "Czechia"),
    ("the Blue Mosque", "the blue mosque", "Istanbul", "Turkey"),
    ("the Belem Tower", "the belem tower", "Lisbon", "Portugal"),
    ("the Tokyo Tower", "the tokyo tower", "Tokyo", "Japan"),
    ("the Great Sphinx", "the great sphinx", "Cairo", "Egypt"),
    ("the Little Mermaid", "the little mermaid", "Copenhagen", "Denmark"),
]

# Words for the unrelated pairs of the control, each with sentences of its own.
FACTS = {
    "Bread": [
        "Bread is made from flour and water.",
        "The loaf lies on a board.",
        "A knife cuts it into slices.",
        "The crust is brown.",
        "Bread is baked before dawn.",
    ],
    "Milk": [
        "Milk comes from the cow.",
        "The jug holds two pints.",
        "The cream rises to the top.",
        "The can stands in cold water.",
        "Milk is carried up the street in cans.",
    ],
    "Monday": [
        "On Monday the week begins.",
        "The shops open again on Monday.",
        "The bins are emptied on Monday.",
        "The market is closed on Monday.",
        "The post comes late on Monday.",
    ],
    "Friday": [
        "On Friday the week ends.",
        "The fish van comes on Friday.",
        "The wages are paid on Friday.",
        "The boats come in on Friday.",
        "The office closes at three on Friday.",
    ],
    "River": [
        "The river runs to the sea.",
        "The river has two banks.",
        "The ferry crosses it at noon.",
        "The current is strong in April.",
        "The river is deep below the mill.",
    ],
    "Mountain": [
        "The mountain is two miles high.",
        "The top is white with snow.",
        "The path climbs from the valley.",
        "The rock is grey.",
        "The mountain lies behind two valleys.",
    ],
    "Piano": [
        "The piano has eighty-eight keys.",
        "The tuner comes once a year.",
        "The lid is closed.",
        "The black keys stand in groups.",
        "The piano has three pedals.",
    ],
    "Drum": [
        "The drum is made of skin and wood.",
        "The sticks lie on top.",
        "The march has a slow beat.",
        "The drum hangs from a belt.",
        "The drum leads the parade.",
    ],
    "Chair": [
        "The chair has four legs.",
        "The seat is made of straw.",
        "People sit on it.",
        "The back is straight.",
        "The chair was made by a carpenter.",
        "The arms are of oak.",
    ],
    "Lamp": [
        "The lamp stands on the desk.",
        "The bulb is new.",
        "The switch is on the wall.",
        "The shade is yellow.",
        "The lamp burns until midnight.",
        "The wire runs along the floor.",
    ],
    "Shirt": [
        "The shirt has seven buttons.",
        "The collar is blue.",
        "The sleeves are long.",
        "The iron is hot.",
        "The shirt is made of cotton.",
    ],
    "Shoe": [
        "The shoe has a rubber sole.",
        "The laces are black.",
        "The heel is flat.",
        "The pair stands by the door.",
        "The shoe was mended by the cobbler.",
    ],
    "Paper": [
        "The paper is sold by the sheet.",
        "The mill makes it from rags.",
        "The ink dries on it.",
        "The pages are cut.",
        "The paper is folded twice.",
    ],
    "Stone": [
        "The stone came from the quarry.",
        "The mason cuts it by hand.",
        "The wall is built of it.",
        "The cart carries two tons.",
        "The stone weighs ten pounds.",
    ],
    "March": [
        "March has thirty-one days.",
        "March comes after February.",
        "The fields are ploughed in March.",
        "The wind is strong in March.",
        "The lambs are born in March.",
    ],
    "October": [
        "October comes after September.",
        "The leaves fall in October.",
        "The clocks change in October.",
        "The grapes are picked in October.",
        "The nights grow longer in October.",
    ],
    "Red": [
        "Red is the colour of bricks.",
        "The pillar box is red.",
        "The top light is red.",
        "Ripe tomatoes are red.",
        "The flag has a red cross.",
    ],
    "Blue": [
        "Blue is the colour of the sea.",
        "The map shows water in blue.",
        "The ink is blue.",
        "The sky is blue at noon.",
        "The plates have a blue rim.",
    ],
    "North": [
        "The needle points to the north.",
        "Moss grows on the north side.",
        "The north wind brings snow.",
        "The north road ends at the lake.",
        "Geese leave the north in autumn.",
    ],
    "South": [
        "The swallows fly to the south.",
        "The south wall is dry.",
        "The south road leads to the coast.",
        "The vines grow on the south slope.",
        "The ship sails to the south.",
    ],
    "Sheep": [
        "The sheep are shorn in May.",
        "The wool is sold by weight.",
        "The shepherd counts the flock.",
        "The sheep graze between the rocks.",
    ],
    "Hen": [
        "The hen lays one egg a day.",
        "The feathers are brown.",
        "The hen sits on the nest.",
        "The coop has a small door.",
        "The hen scratches in the sand.",
    ],
    "Salt": [
        "Salt comes from the mine.",
        "The grains are white.",
        "The sea leaves it on the rocks.",
        "Salt melts the ice on the road.",
        "The soup is cooked with salt.",
    ],
    "Pepper": [
        "Pepper grows on a vine.",
        "The mill grinds it.",
        "The berries are dried in the sun.",
        "Pepper came by ship from the east.",
        "The jar of pepper has a lid.",
    ],
}
PAIRS = [
    ("Bread", "Milk"),
    ("Monday", "Friday"),
    ("River", "Mountain"),
    ("Piano", "Drum"),
    ("Chair", "Lamp"),
    ("Shirt", "Shoe"),
    ("Paper", "Stone"),
    ("March", "October"),
    ("Red", "Blue"),
    ("North", "South"),
    ("Sheep", "Hen"),
    ("Salt", "Pepper"),
]
