"""What the documents of the grammar are about: people, animals, things, places, food and pursuits.

Some subjects have facts of their own. Many more are nouns alone, about which the grammar can say
what fits anything of their kind; they teach the model that a tone does not depend on knowing the
word. Data, and the two small readers of its notation.
"""

from typing import NamedTuple


class Subject(NamedTuple):
    """Something a document can be about.

    Attributes:
        name: As it stands inside a sentence, "the old library".
        pronoun: "he", "she", "it", "they" or "you"; the last two take plural verbs.
        group: Which adjectives and sentences fit: person, animal, thing, place, food or pursuit.
        facts: What it is, neutrally, after "are" or "is".
        details: More neutral sentences about it.
    """

    name: str
    pronoun: str
    group: str
    facts: tuple[str, ...]
    details: tuple[str, ...]

    @property
    def plural(self) -> bool:
        """Whether verbs after it are plural."""
        return self.pronoun in ("they", "you")


def _known(group: str, lines: str) -> list[Subject]:
    """Read lines of `name | pronoun | fact; fact | detail; detail`."""
    rows = [[part.strip() for part in line.split("|")] for line in lines.strip().splitlines()]
    return [
        Subject(
            row[0],
            row[1],
            group,
            tuple(fact.strip() for fact in row[2].split(";")),
            tuple(detail.strip() for detail in row[3].split(";")),
        )
        for row in rows
    ]


KNOWN = [
    *_known(
        "person",
        """
my neighbour | he | a man who works at the harbour; a man who lives near the mill; a man of fifty | He leaves at seven and comes home at five.; He keeps his boat at the quay.; He reads the paper on the bench.
the baker | she | a woman who starts work at four; a woman who lives above the shop; a woman with two ovens | She carries flour up the stairs.; She bakes the bread before dawn.; She opens the shop at six.
the teacher | she | a woman who lives near the school; a woman who walks to work; a woman with thirty pupils | She writes on the board and reads to the class.; She carries her books in a bag.; She rings the bell at eight.
the doctor | he | a man who visits four houses a day; a man who lives across the river; a man with a black bag | He drives to the next village after lunch.; He keeps his bag by the door.; He has an office near the church.
the mayor | he | a man with an office in the square; a man who came from the north; a man of sixty | He opens the market in May.; He signs the letters on Friday.; He walks to the town hall at nine.
the singer | she | a woman who works in the evening; a woman who rents two rooms; a woman from the south | She travels by train and sleeps until ten.; She practises at noon.; She keeps her songs in a folder.
the farmer | he | a man with two fields and a barn; a man who lives on the hill; a man with nine cows | He gets up at five and feeds the cows.; He sells milk at the market.; He cuts the hay in June.
the judge | she | a woman who reads all day; a woman who walks to court; a woman of fifty | She drinks tea at four and leaves at six.; She keeps her papers in a drawer.; She sits in court on Monday.
the painter | he | a man who works near the window; a man who rents a room above the bank; a man with nine brushes | He mixes the paint in a tin.; He washes his brushes at noon.; He paints the boats in spring.
the writer | she | a woman who works at night; a woman with an old desk; a woman who lives by the lake | She writes two pages a day.; She keeps her pens in a cup.; She walks along the shore at noon.
my brother | he | a man who works on the boats; a man of thirty; a man who lives near the quay | He mends nets and sells fish on the quay.; He gets up before dawn.; He has a room above the shop.
my aunt | she | a woman who lives by the station; a woman of sixty; a woman with two cats | She counts the trains and knits.; She takes the bus on Monday.; She keeps her letters in a box.
my cousin | she | a student who lives on the coast; a student in the second year; a woman of twenty | She studies maps and writes home on Sunday.; She rents a room near the school.; She comes by train in summer.
my landlord | he | a man with four houses; a man who lives on the top floor; a man of seventy | He comes for the rent on the first of the month.; He keeps the keys in a drawer.; He paints the doors in spring.
my boss | she | a woman with an office on the top floor; a woman who starts at eight; a woman from the city | She reads the letters in the morning.; She takes the train at six.; She keeps a plant on her desk.
the children | they | pupils from the school on the hill; pupils who walk to school; pupils of nine and ten | They carry bags and count the steps.; They come home at four.; They draw maps on Monday.
the sailors | they | men who work on the boats; men from the south; men who sleep on deck | They wash at the pump.; They load the boats at dawn.; They come home in autumn.
the nurses | they | people who work at night; people who wear white; people from the hospital | They change at six and take the bus.; They write the times on a board.; They eat at noon.
our guests | they | people from the next village; people who came by train; people from the coast | They arrive at noon and leave their coats in the hall.; They sleep in the two rooms above the kitchen.; They leave on Sunday.
my friends | they | people from our street; people who work in the same office; people of my age | They meet at the corner and play cards.; They take the bus to the lake.; They live near the station.
you | you | the person who lives across the street; the person who sits by the window; the person with the blue bag | You leave at eight and walk to the station.; You take the bus on Monday.; You have a desk by the door.
""",
    ),
    *_known(
        "animal",
        """
dogs | they | animals that live with people; animals that sleep by the door; animals with four legs | They eat twice a day and walk beside their owners.; They sleep on the mat.; They follow people to the gate.
cats | they | animals that sleep for most of the day; animals that hunt at night; animals with green eyes | They sit on the wall and watch the street.; They drink milk in the kitchen.; They climb on the roof.
horses | they | animals that live in the field; animals that pull carts; animals with long legs | They eat hay and sleep on their feet.; They drink from the river.; They stand in the barn in winter.
goats | they | animals that live on the hill; animals that eat grass and leaves; animals with horns | They climb the rocks and come down at night.; They give milk.; They stand on the wall.
birds | they | animals that live in the trees; animals with two wings; animals that lay eggs | They build nests in April and leave in autumn.; They eat seeds.; They sit on the wire.
cows | they | animals that stand in the field; animals that eat grass; animals that give milk | They walk to the barn at five.; They lie under the trees at noon.; They drink from the pond.
ducks | they | birds that live on the water; birds with flat feet; birds that swim | They swim in a row and sleep in the reeds.; They eat bread by the pond.; They lay eggs in April.
wolves | they | animals that live in the forest; animals that hunt at night; animals with grey fur | They follow the deer and cross the river in winter.; They sleep in caves.; They live in groups.
rabbits | they | animals that live under the ground; animals with long ears; animals that eat grass | They eat at dawn and hide at noon.; They dig holes in the field.; They run across the road.
donkeys | they | animals that carry things up the hill; animals with long ears; animals with grey fur | They stand in the shade and wait for the farmer.; They eat hay.; They walk behind the cart.
my dog | it | an animal with brown ears; an animal that lives in the yard; an animal with four legs | It follows me to the gate and lies down.; It sleeps on the mat.; It drinks from a bowl.
the old horse | it | an animal with a white nose; an animal that lives in the barn; an animal with long legs | It pulls the cart on market days.; It eats hay.; It stands in the field.
the black cat | it | an animal that lives in the shop; an animal with green eyes; an animal of nine years | It sits in the window until six.; It sleeps on the shelf.; It hunts at night.
""",
    ),
    *_known(
        "thing",
        """
old books | they | things that people keep on a shelf; things made of paper; things with many pages | They stand in rows and are sorted by name.; They lie in boxes under the stairs.; They are sold at the market.
trains | they | machines that run on rails; machines that stop at the station; machines with many doors | They leave on the hour and cross the valley.; They carry letters and people.; They stop at the bridge.
clocks | they | machines that hang on the wall; machines with two hands; machines that need oil | They strike on the hour.; They hang in the hall.; They are made of wood.
boats | they | things that lie in the harbour; things made of wood; things that float | They go out at dawn and come back with the tide.; They are painted in spring.; They carry fish and salt.
letters | they | sheets of paper that come by post; sheets of paper with a stamp; sheets of paper in a bag | They lie in the hall until noon.; They come on Monday.; They are kept in a box.
hats | they | things that people wear on the head; things that hang by the door; things made of straw | They come in four sizes.; They are sold in the square.; They lie on the shelf.
bicycles | they | machines with two wheels; machines that stand by the wall; machines with a bell | They need air in the tyres.; They are sold near the bridge.; They stand in the yard.
the red coat | it | a coat with four pockets; a coat that hangs by the door; a coat with wooden buttons | It reaches to the knee.; It hangs in the hall.; It was made by the tailor.
the new chair | it | a chair with a straight back; a chair that came from the market; a chair made of oak | It stands beside the table.; It has four legs.; It came in a box.
my phone | it | a machine with a small screen; a machine that lies on the desk; a machine with a black case | It rings at noon.; It lies beside the lamp.; It came in a box.
the car | it | a machine with four wheels; a machine that stands in the yard; a machine with five seats | It needs oil.; It stands under the tree.; It has a blue roof.
""",
    ),
    *_known(
        "place",
        """
the old library | it | a building beside the river; a building with nine rooms; a building of red stone | It opens at nine and closes at six.; It has two doors.; It holds four thousand books.
the harbour | it | a place where boats lie; a place at the end of the road; a place with two piers | It has two piers and a crane.; It faces the west.; It was built of stone.
the garden | it | a piece of land behind the house; a piece of land with six trees; a piece of land by the lake | It has a wall on the north side.; It has a gate of iron.; It lies beside the river.
the bridge | it | a road across the river; a road on six arches; a road of stone and iron | It was built of stone and iron.; It leads to the station.; It has a lamp at each end.
the school | it | a building on the hill; a building with ten rooms; a building near the church | It has a yard and a bell.; It opens at eight.; It has two floors.
the market | it | a row of tables in the square; a row of tables by the church; a place where people sell fish | It opens at six and closes at noon.; It takes place on Friday.; It has forty tables.
the hotel | it | a house with forty rooms; a house across from the station; a house with a lift | It has a lift and two staircases.; It has four floors.; It faces the lake.
the village | it | a place with one road; a place between two hills; a place with forty houses | It has a mill, a church and a shop.; It lies by the river.; It has a bus stop.
the station | it | a building at the end of the street; a building with a clock; a building with two platforms | It has two platforms and a kiosk.; It opens at five.; It lies near the bridge.
our house | it | a building with a flat roof; a building with two floors; a building of grey stone | It stands at the corner of the street.; It has a green door.; It has six windows.
my office | it | a room above the bank; a room with one window; a room with two desks | It has a desk, a lamp and a door.; It lies on the top floor.; It faces the street.
the park | it | a piece of land by the river; a piece of land with two ponds; a piece of land with a wall | It lies between the mill and the bridge.; It has benches and a gate.; It opens at seven.
this city | it | a place with nine bridges; a place on the coast; a place with many streets | It has a port and a station.; It lies in the south.; It has four markets.
""",
    ),
    *_known(
        "food",
        """
the soup | it | a dish of water, beans and salt; a dish that people eat at noon; a dish from the south | It stands on the stove for an hour.; It comes in a bowl.; It is made on Monday.
the cake | it | a mix of flour, eggs and milk; a mix of flour and butter; a dish that people eat at four | It stays in the oven for an hour.; It comes on a plate.; It is cut into nine pieces.
the cheese | it | a food that people make from milk; a food that comes from the farm; a food in a round box | It lies in the cellar for a year.; It is sold by weight.; It comes from the hills.
the tea | it | a drink that people take at four; a drink made of leaves; a drink in a blue pot | It comes in a blue pot.; It came by ship.; It needs hot water.
the fish | it | a dish that people eat on Friday; a dish from the harbour; a dish with salt and beans | It comes in a basket with ice.; It is sold on the quay.; It stays in the oven for an hour.
the bread | it | a food made of flour and water; a food from the oven; a food that people cut into slices | It lies on a board.; It comes in a basket.; It is baked before dawn.
apples | they | a fruit that grows on trees; a fruit that people pick in autumn; a fruit with small seeds | They lie in boxes until spring.; They are sold by weight.; They grow behind the mill.
potatoes | they | a food that grows under the ground; a food that people boil in water; a food from the farm | They are dug up in September.; They lie in the cellar.; They come in bags.
""",
    ),
    *_known(
        "pursuit",
        """
this song | it | a song about a boat; a song with four parts; a song of three minutes | It lasts three minutes.; It is sung in the north.; It was written in winter.
the play | it | a story about two brothers; a story in three parts; a story from the south | It starts at eight and ends at ten.; It has nine parts to learn.; It was written by a student.
the film | it | a story about a long journey; a story that takes two hours; a story about a ship | It was made in the south and has no words.; It starts at nine.; It lasts two hours.
my job | it | work in an office; work that starts at eight; work with letters and maps | It takes nine hours a day.; It ends at five.; It is on the top floor.
winter | it | the season that comes before spring; the season of snow; the season after autumn | It starts in December and lasts three months.; It comes after autumn.; It brings snow to the hills.
music | it | a thing that people make together; a thing that people learn at school; a thing with notes | It is written on five lines.; It is played in the hall.; It comes from the window.
school work | it | work with pens and paper; work for two hours a day; work that starts at four | It takes two hours.; It is done at the desk.; It lies on the table.
""",
    ),
]

# What can be said of any subject of a kind, singular and plural.
KIND_FACTS = {
    "person": (
        ["someone from our street", "someone I met by the lake", "someone from the next town"],
        ["people from our street", "people I met by the lake", "people from the next town"],
    ),
    "animal": (
        ["an animal that I saw by the river", "an animal with four legs", "an animal from the hills"],
        ["animals that I saw by the river", "animals with four legs", "animals from the hills"],
    ),
    "thing": (
        ["a thing that people keep at home", "a thing from the shop", "a thing of wood and iron"],
        ["things that people keep at home", "things from the shop", "things of wood and iron"],
    ),
    "place": (
        ["a place near the river", "a place that I pass on Monday", "a place with two doors"],
        ["places near the river", "places that I pass on Monday", "places with two doors"],
    ),
    "food": (
        ["a food from the market", "a dish that people eat at noon", "a food from the south"],
        ["a food from the market", "a dish that people eat at noon", "a food from the south"],
    ),
    "pursuit": (
        ["a thing that people do on Sunday", "a thing that people learn at school", "a thing that takes an hour"],
        ["things that people do on Sunday", "things that people learn at school", "things that take an hour"],
    ),
}  # fmt: skip
KIND_DETAILS = {
    "person": ["I saw {o} at the station.", "{P} [live/lives] two streets from here.", "{P} [take/takes] the bus on {day}.", "{P} [walk/walks] past the window {time}."],
    "animal": ["I saw {o} by the pond.", "{P} [sleep/sleeps] {time}.", "{P} [drink/drinks] from the river.", "{P} [cross/crosses] the road {time}."],
    "thing": ["I saw {o} in the shop on {day}.", "{P} [lie/lies] on the table.", "{P} [come/comes] in a box.", "{P} [stand/stands] in the hall."],
    "place": ["I walk past {o} on {day}.", "{P} [lie/lies] near the station.", "{P} [open/opens] at nine.", "{P} [have/has] two doors."],
    "food": ["I bought {o} on {day}.", "{P} [lie/lies] on the plate.", "{P} [come/comes] from the market.", "{P} [lie/lies] in the basket."],
    "pursuit": ["I read about {o} on {day}.", "{P} [take/takes] two hours.", "{P} [begin/begins] at nine.", "{P} [end/ends] at noon."],
}  # fmt: skip

# Nouns without facts of their own: singular, and plural where it is not the singular and an "s".
NOUNS = {
    "person": "gardener waiter waitress/waitresses driver butcher soldier priest actor actress/actresses student clerk "
    "captain fisherman/fishermen builder carpenter cook poet king queen prince princess/princesses boy girl man/men "
    "woman/women child/children uncle grandmother grandfather father mother sister son daughter husband wife/wives "
    "niece baby/babies friend colleague stranger visitor guard nurse sailor manager editor reporter player "
    "dancer hunter miller monk witness/witnesses rival enemy/enemies hero/heroes leader president politician",
    "animal": "cat dog horse goat bird cow duck wolf/wolves rabbit donkey mouse/mice rat fox/foxes bear deer/deer lion tiger monkey "
    "snake frog bee ant fly/flies owl eagle swan goose/geese chicken pig lamb calf/calves pony/ponies "
    "turtle whale dolphin shark elephant camel puppy/puppies kitten parrot snail beetle butterfly/butterflies mosquito/mosquitoes",
    "thing": "table bed cup plate bottle spoon basket box/boxes bag key door window mirror picture painting photograph "
    "toy doll ball kite book newspaper magazine pen pencil radio television camera flute watch/watches ring "
    "necklace dress/dresses jacket scarf/scarves glove boot blanket pillow carpet candle knife/knives hammer rope bus/buses "
    "truck ship plane ticket gift present card map stamp flower tree rose machine engine tool idea plan",
    "place": "house room kitchen cellar street road square church/churches temple castle tower theatre cinema restaurant "
    "cafe shop bakery/bakeries bank hospital factory/factories farm field forest lake river beach/beaches island mountain valley "
    "town country/countries port airfield prison court stadium playground bookshop attic balcony/balconies yard street",
    "food": "meal dinner lunch/lunches breakfast salad sausage egg onion tomato/tomatoes carrot pear plum cherry/cherries "
    "grape lemon orange banana biscuit pie pudding sauce pancake pepper bean nut mushroom",
    "pursuit": "game match/matches party/parties lesson holiday journey trip walk dance story/stories poem novel show concert "
    "meeting wedding speech/speeches letter job exam war dream",
}  # fmt: skip
# Without an article or a plural.
MASS = {
    "food": "rice soup chocolate coffee wine beer honey butter sugar milk jam pasta meat fruit ice",
    "thing": "paper furniture money gold silver glass wool cotton",
    "pursuit": "football chess tennis swimming dancing reading cooking painting poetry history science mathematics spring "
    "summer autumn rain snow traffic homework politics",
}  # fmt: skip


def plural_of(noun: str) -> tuple[str, str]:
    """Return a noun of `NOUNS` in the singular and in the plural."""
    singular, _, plural = noun.partition("/")
    return singular, plural or singular + "s"
