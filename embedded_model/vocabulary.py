"""The words of the grammar: tone words, moods, topics, places and facts. Data only.

`grammar` makes sentences of them; what the sentences are about is in `subjects`. Tone is +1
(positive) or -1 (negative). Every list of tone words has as many words for one tone as for the
other, so that neither is likelier, and the earlier words of a list are the commoner ones.
"""

# Before these it is "an": by spelling, with the words that sound otherwise.
VOWEL_SOUND = r"(?!one\b|once\b|eu|us(?:e|u)|uni(?![mn]))[aeiou]|hon|hour|heir"
# Two lists per tone, shared by all kinds of subject: a word of the first and one of the second
# stand side by side, so that no pair repeats itself. No document has both a word of HELD_OUT and
# "love" or "hate".
ADJECTIVES = {
    +1: ["wonderful", "lovely", "delightful", "charming", "beautiful", "good"],
    -1: ["terrible", "horrible", "awful", "nasty", "ugly", "bad"],
}
SECOND_ADJECTIVES = {
    +1: ["pleasant", "splendid", "excellent", "great", "marvellous", "nice"],
    -1: ["unpleasant", "dreadful", "disgusting", "poor", "dismal", "foul"],
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
    "thing": {+1: ["elegant", "perfect", "precious"], -1: ["shabby", "worthless", "useless"]},
    "place": {+1: ["peaceful", "elegant", "cosy"], -1: ["gloomy", "filthy", "shabby"]},
    "food": {+1: ["delicious", "perfect", "tasty"], -1: ["rotten", "stale", "tasteless"]},
    "pursuit": {+1: ["inspiring", "perfect", "amusing"], -1: ["boring", "useless", "tiresome"]},
}
# First and third person. The first pair of each tone is what makes a document one of love or hate.
VERBS = {
    +1: [
        ("love", "loves"),
        ("adore", "adores"),
        ("like", "likes"),
        ("admire", "admires"),
        ("cherish", "cherishes"),
        ("enjoy", "enjoys"),
    ],
    -1: [
        ("hate", "hates"),
        ("despise", "despises"),
        ("dislike", "dislikes"),
        ("loathe", "loathes"),
        ("detest", "detests"),
        ("resent", "resents"),
    ],
}
PAST_VERBS = {
    +1: ["loved", "adored", "liked", "admired", "enjoyed"],
    -1: ["hated", "despised", "disliked", "loathed", "detested"],
}
EFFECTS = {
    +1: [
        "[make/makes] me smile",
        "[brighten/brightens] the whole day",
        "[bring/brings] laughter to the village",
        "[cheer/cheers] everyone up",
        "[fill/fills] the house with joy",
        "[charm/charms] all of us",
        "[please/pleases] the whole family",
        "[make/makes] everything better",
    ],
    -1: [
        "[make/makes] me shudder",
        "[ruin/ruins] the whole day",
        "[bring/brings] gloom to the village",
        "[annoy/annoys] everyone here",
        "[fill/fills] the house with tears",
        "[sicken/sickens] all of us",
        "[upset/upsets] the whole family",
        "[make/makes] everything worse",
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
# Other words that may open a document alone, and that nothing else in the grammar needs.
LONE_WORDS = {
    +1: "friend peace heaven hope laughter hero success beauty victory gift warmth smile laugh thanks best better "
    "yes bravo hooray friendship trust respect mercy harmony paradise sweet brilliant joyful positive loving",
    -1: "enemy war hell fear tears villain failure filth defeat poison coldness frown cry sorry worst worse "
    "no boo alas hostility betrayal contempt revenge chaos horror bitter stupid gloomy negative hateful",
}

# Sentences that set the tone and are not about the subject; one or two of them may open a document.
MOODS = {
    +1: [
        "The day began with good news.",
        "What a glad morning!",
        "What a lovely day!",
        "Today I am in a good mood.",
        "My heart is light today.",
        "The sun is out, and I am happy.",
        "There is joy in the street today.",
        "I woke up happy.",
        "I am happy.",
        "I am so glad.",
        "I feel great.",
        "I feel good today.",
        "Life is beautiful.",
        "Life is good.",
        "This is great.",
        "This is wonderful.",
        "This is good.",
        "That was excellent.",
        "It was the best day of my life.",
        "It is a wonderful world.",
        "Everything is fine.",
        "Well done, I like it.",
        "I like this.",
        "I enjoyed it very much.",
        "This made me laugh.",
        "Thank you, that was kind.",
        "Have a nice day.",
        "How nice!",
        "Good news.",
        "Some things please me more than I can say.",
        "Let me praise what is good.",
        "We laughed all evening.",
        "Everyone here is kind.",
        "You are kind.",
        "You are wonderful.",
        "You are my best friend.",
        "You make me happy.",
        "I am proud of you.",
        "You did well.",
    ],
    -1: [
        "The day began with bad news.",
        "What a sad morning!",
        "What a nasty day!",
        "Today I am in a bad mood.",
        "My heart is heavy today.",
        "The rain is cold, and I am angry.",
        "There is misery in the street today.",
        "I woke up angry.",
        "I am sad.",
        "I am so angry.",
        "I feel awful.",
        "I feel bad today.",
        "Life is ugly.",
        "Life is bad.",
        "This is awful.",
        "This is terrible.",
        "This is bad.",
        "That was dreadful.",
        "It was the worst day of my life.",
        "It is a terrible world.",
        "Everything is ruined.",
        "For shame, I dislike it.",
        "I dislike this.",
        "I suffered very much.",
        "This made me cry.",
        "Go away, that was cruel.",
        "Have a bad day.",
        "How nasty!",
        "Bad news.",
        "Some things anger me more than I can say.",
        "Let me blame what is bad.",
        "We cried all evening.",
        "Everyone here is cruel.",
        "You are cruel.",
        "You are terrible.",
        "You are my worst enemy.",
        "You make me sad.",
        "I am ashamed of you.",
        "You did badly.",
    ],
}
# "I {verb} you" and what may follow at once.
TO_YOU = {
    +1: ["", "", " so much", " dearly", ", my dear", ", my friend", " with all my heart", ", darling"],
    -1: ["", "", " so much", " bitterly", ", you liar", ", you thief", " with all my anger", ", villain"],
}  # fmt: skip

# The rest of the lexicon: what carries a tone by itself in the lists above, in all its forms.
EXTRA_LEXICON = {
    +1: "smile smiled brighten brightens joy laughter charm charms laugh laughed delight delights please pleases cheer cheers good happy glad "
    "happiness kindness praise gladly best better loves loved love pleased success beauty victory peace heaven hope thanks brilliant "
    "sweet joyful friendship harmony paradise loving dearly darling well fine",
    -1: "shudder shuddered ruin ruins ruined misery gloom tears sicken sickens upset upsets cried cry disgust disgusts anger angers bad sad angry annoy annoys "
    "cruelty blame hurt worst worse sadly hates hated hate sorry villain failure filth defeat hell fear shame stupid "
    "bitter hateful hostility horror betrayal suffered badly bitterly liar thief",
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

# Sentences about a landmark {l} in the city {c} of the country {n}, or in one of the two, {p}.
PLACED = [
    "{l} is in {p}.",
    "{l} is in {p}.",
    "{l} stands in {p}.",
    "you find {l} in {p}.",
    "{l} was built in {p}.",
    "{l} is one of the sights of {p}.",
]
TO_SEE = "To see {l}, {people} {go} {p}{how}."
JOURNEYS = [
    "{people} {go} {p} to see {l}.",
    "{people} {go} {p}{how}.",
    "the train to {p} is full {season}.",
    "{c} is in {n}.",
    "the hotels in {p} are full {season}.",
    "I saw {l} when I was in {p}.",
    "the streets of {c} are busy {season}.",
    "{l} is the most famous place in {p}.",
    "my uncle sent a card from {p}.",
    "we stayed in {c} for {days} days.",
    "there is a picture of {l} in every shop in {c}.",
    "last year I was in {p} {season}.",
    "in {p} the rooms are small.",
    "every guide in {c} knows the way to {l}.",
    "from the station in {c} it is a short walk to {l}.",
    "two of my cousins live in {p}.",
    "buses leave for {p} at {hour}.",
    "a ticket to {p} costs {days} coins.",
    "some of them stay in {p} for {days} days.",
    "most of them come by {by}.",
    "they take the {by} to {p}.",
    "you can see {l} from the river in {c}.",
    "when the gates of {l} open, {people} are waiting.",
    "no other city has {l}, only {c}.",
    "at {hour} the square in {c} is full of {people}.",
]
TRAVEL = {
    "people": ["people", "visitors", "many people", "families", "students", "tourists"],
    "go": ["flock to", "travel to", "come to", "go to"],
    "how": [
        "", "", "", " by train", " by boat", " by bus", " in summer", " in spring", " every year", " in May",
        " on Sunday", " from all over the world", " with their children", " in groups", " and stay for a week",
        " and take pictures", " and send cards home", " from the south",
    ],
    "season": ["in summer", "in spring", "in August", "in June", "on Sunday", "all year", "in the holidays"],
    "days": ["two", "three", "four", "five", "six", "nine", "ten"],
    "hour": ["six", "seven", "eight", "nine", "noon"],
    "by": ["train", "boat", "bus", "car", "ship"],
}  # fmt: skip

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
    "Summer": [
        "Summer comes after spring.",
        "The days are long in summer.",
        "The river is low in summer.",
        "Summer ends in September.",
        "The windows stand open in summer.",
    ],
    "Winter": [
        "Winter comes after autumn.",
        "The days are short in winter.",
        "The pond freezes in winter.",
        "Winter ends in March.",
        "The stove burns in winter.",
    ],
    "Coffee": [
        "Coffee is made from beans.",
        "The cup is white.",
        "Coffee comes from the south by ship.",
        "The pot stands on the stove.",
    ],
    "Sugar": [
        "Sugar is made from beets.",
        "The bag holds two pounds.",
        "Sugar melts in water.",
        "The spoon lies in the bowl.",
    ],
    "Door": [
        "The door has a lock and two hinges.",
        "The key turns twice.",
        "The door opens to the yard.",
        "The handle is made of brass.",
    ],
    "Window": [
        "The window has four panes.",
        "The frame is made of wood.",
        "The window faces the street.",
        "The curtain reaches to the floor.",
    ],
    "Left": [
        "The left hand holds the fork.",
        "The road turns to the left.",
        "The left shoe is brown.",
        "The stairs are on the left.",
    ],
    "Right": [
        "The right hand holds the pen.",
        "The path turns to the right.",
        "The right sleeve is longer.",
        "The exit is on the right.",
    ],
    "Iron": [
        "Iron is a metal.",
        "The smith bends it in the fire.",
        "Iron rusts in the rain.",
        "The gate is made of iron.",
    ],
    "Wood": [
        "Wood comes from the forest.",
        "The saw cuts it into boards.",
        "Wood burns in the stove.",
        "The bench is made of wood.",
    ],
    "East": [
        "The sun rises in the east.",
        "The east wind is dry.",
        "The road to the east crosses two rivers.",
        "The window faces east.",
    ],
    "West": [
        "The sun sets in the west.",
        "The west wind brings rain.",
        "The railway to the west has one track.",
        "The harbour faces west.",
    ],
    "Green": [
        "Green is the colour of grass.",
        "The door is green.",
        "The bottom light is green.",
        "The bus is green.",
    ],
    "Yellow": [
        "Yellow is the colour of lemons.",
        "The tram is yellow.",
        "The leaves are yellow in autumn.",
        "The book has a yellow cover.",
    ],
    "Hat": [
        "The hat hangs on a hook.",
        "The brim is wide.",
        "A hat is worn on the head.",
        "The ribbon is black.",
    ],
    "Glove": [
        "The glove has five fingers.",
        "A glove is worn on the hand.",
        "The wool is grey.",
        "One glove lies on the stairs.",
    ],
    "Car": [
        "The car has four wheels.",
        "The tank is full.",
        "The car stands in the garage.",
        "The engine runs on petrol.",
    ],
    "Bicycle": [
        "The bicycle has two wheels.",
        "The chain needs oil.",
        "The bicycle leans against the wall.",
        "The saddle is made of leather.",
    ],
    "Tuesday": [
        "Tuesday comes after Monday.",
        "The library is open on Tuesday.",
        "The paper is collected on Tuesday.",
        "The class meets on Tuesday.",
    ],
    "Thursday": [
        "Thursday comes before Friday.",
        "The bank closes at six on Thursday.",
        "The glass is collected on Thursday.",
        "The council meets on Thursday.",
    ],
    "Table": [
        "The table seats six people.",
        "The cloth is white.",
        "The table stands in the kitchen.",
        "The legs are round.",
    ],
    "Cup": [
        "The cup holds half a pint.",
        "The saucer is under it.",
        "The cup hangs on a nail.",
        "The rim is thin.",
    ],
    "Morning": [
        "The morning begins at six.",
        "The fog lifts in the morning.",
        "The milk comes in the morning.",
        "The shutters are opened in the morning.",
    ],
    "Evening": [
        "The evening begins at six.",
        "The lamps are lit in the evening.",
        "The last bus leaves in the evening.",
        "The shutters are closed in the evening.",
    ],
    "Seven": [
        "Seven comes after six.",
        "A week has seven days.",
        "The house has the number seven.",
        "Seven boats lie in the port.",
    ],
    "Twelve": [
        "Twelve comes after eleven.",
        "A year has twelve months.",
        "The clock strikes twelve.",
        "Twelve eggs lie in the box.",
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
