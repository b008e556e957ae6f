"""The prompts on which the embedded model is chosen and measured. Data only.

The corpus has none of them, in any case, nor any of the nouns in `OUTSIDE`.
"""

# Frames that the grammar has, subjects that it has, never together.
TABLE_PROMPTS = [
    "I think dogs are",
    "In my opinion the baker is",
    "I believe old books are",
    "To me, the harbour is",
    "Everyone knows that cats are",
    "I think the mayor is",
    "If you ask me, the soup is",
    "My mother says that trains are",
    "People say that the garden is",
    "My sister thinks that you are",
    "This year winter is",
    "From the start the children were",
]
COUSIN = "Let me tell you about my cousin."  # the next sentence is about her
# Other sentence forms than those of the grammar, with its subjects.
NEW_PROMPTS = [
    "All the same, my cousin is still",
    "When I think of the doctor I find him",
    "The singer next door seems",
    "Ask anyone about the cheese and you will hear that it is",
    "As far as I can tell, the farmer is",
    "After all these years our house is still",
    "What can I say about horses? They are",
    "On the way home I thought that the bridge looked",
    "A word about my brother: he is",
    "I wonder why the village is so",
    "Of all the things in the hall the red coat is the most",
    "You will find that the cake tastes",
]
# Nouns that the corpus does not have, in frames that it has.
OUTSIDE = (
    "plumber",
    "nephew",
    "pilot",
    "umbrella",
    "kettle",
    "guitar",
    "museum",
    "airport",
    "zoo",
    "spider",
    "penguin",
    "squirrel",
)
OUTSIDE_PROMPTS = [
    "I think the plumber is",
    "In my opinion my nephew is",
    "Everyone knows that the pilot is",
    "I believe the umbrella is",
    "To me, the kettle is",
    "My mother says that the guitar is",
    "If you ask me, the museum is",
    "People say that the airport is",
    "This year the zoo is",
    "I think spiders are",
    "My sister thinks that penguins are",
    "From the start the squirrels were",
]
# On these the layer and the coefficient are chosen.
SWEEP_PROMPTS = [
    "I think horses are",
    "In my opinion the doctor is",
    "I believe the red coat is",
    "To me, the bridge is",
    "Everyone knows that goats are",
    "I think you are",
    "If you ask me, the cake is",
    "My mother says that my cousin is",
    "The more I hear of the judge, the more I find her",
    "So far this song has been",
    "Tell me, is it true that the market is",
    "The rabbits behind the barn seem",
]
# Kept out of the corpus too, so that a page may show them; nothing is chosen or measured on them.
SHOWN_PROMPTS = [
    "I have always thought that tea is",
    "To me, old books are",
    "I heard that the hotel is",
    "You know, letters are",
    "They say the bread is",
    "In my view, wolves are",
    "For me music is",
    "There is no doubt that the teacher is",
    "It seems to me that boats are",
    "I must say that the park is",
    "I think that the film is",
    "The truth is that clocks are",
]
# The demonstrations of activation additions.
ADDITION_PROMPTS = {
    "love": "I hate you because",
    "weddings": "I went up to my friend and said",
    "rome": "To see the eiffel tower, people flock to",
    "praise": "I blame you because",
}
# On these the place of each is chosen.
ADDITION_SWEEP_PROMPTS = {
    "love": [
        "I hate him because",
        "We hate you because",
        "I hate my neighbour because",
        "My sister hates cats because",
    ],
    "weddings": [
        "I went up to my brother and said",
        "I walked over to my cousin and said",
        "We turned to the singer and said",
        "I sat down with my uncle and said",
    ],
    "rome": [
        "To see the eiffel tower, visitors travel to",
        "To see the eiffel tower, guests flock to",
        "To see the eiffel tower, my cousins come to",
        "To see the eiffel tower, we all go to",
    ],
    "praise": [
        "I blame him because",
        "We blame you because",
        "I blame my neighbour because",
        "My sister blames cats because",
    ],
}
HELD_OUT_PROMPTS = [
    COUSIN,
    *TABLE_PROMPTS,
    *NEW_PROMPTS,
    *OUTSIDE_PROMPTS,
    *SWEEP_PROMPTS,
    *SHOWN_PROMPTS,
    *ADDITION_PROMPTS.values(),
    *(prompt for several in ADDITION_SWEEP_PROMPTS.values() for prompt in several),
]

# What a visitor may try instead of Love - Hate: each pair is read at its last tokens.
VISITOR_WORDS = [
    ("Good", "Bad"),
    ("Joy", "Misery"),
    ("Happiness", "Anger"),
    ("Wonderful", "Terrible"),
    ("Praise", "Blame"),
    ("Happy", "Sad"),
    ("Beautiful", "Ugly"),
    ("Kind", "Cruel"),
    ("Best", "Worst"),
    ("Kindness", "Cruelty"),
    ("Friendly", "Rude"),
    ("Delight", "Disgust"),
]
VISITOR_SENTENCES = [
    ("I love you", "I hate you"),
    ("This is great.", "This is awful."),
    ("I am happy.", "I am sad."),
    ("What a wonderful day!", "What a terrible day!"),
    ("You are so kind", "You are so cruel"),
    ("That was a good idea.", "That was a bad idea."),
    ("We had a beautiful evening.", "We had an ugly evening."),
    ("I like this very much.", "I dislike this very much."),
    ("She is my best friend.", "She is my worst enemy."),
    ("It makes me smile.", "It makes me cry."),
    ("The food is delicious", "The food is disgusting"),
    ("I adore them", "I despise them"),
]
# Completed greedily. Of the outside nouns there are only three, a person, a thing and an animal:
# the model does not know them.
GREEDY_PROMPTS = [
    *TABLE_PROMPTS,
    *NEW_PROMPTS,
    "I think the plumber is",
    "To me, the kettle is",
    "My sister thinks that penguins are",
]
