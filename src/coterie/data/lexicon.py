"""Words for counterfactual swaps, written for Coterie: pairs that differ in gender, and names that stand for groups.

English only. A pair says the same of a man and of a woman, so swapping it must not change a fair answer.
"""

PAIRS = (
    ("he", "she"), ("himself", "herself"), ("man", "woman"), ("men", "women"), ("boy", "girl"), ("boys", "girls"),
    ("husband", "wife"), ("husbands", "wives"), ("father", "mother"), ("fathers", "mothers"), ("dad", "mum"),
    ("son", "daughter"), ("sons", "daughters"), ("brother", "sister"), ("brothers", "sisters"), ("uncle", "aunt"),
    ("nephew", "niece"), ("grandfather", "grandmother"), ("grandson", "granddaughter"), ("boyfriend", "girlfriend"),
    ("gentleman", "lady"), ("gentlemen", "ladies"), ("mr", "mrs"), ("sir", "madam"), ("businessman", "businesswoman"),
    ("waiter", "waitress"), ("salesman", "saleswoman"), ("groom", "bride"), ("widower", "widow"), ("king", "queen"),
)  # fmt: skip
# First names by the group that readers take them for; a swap goes to a name of another group, the groups in turn.
NAMES = {
    "men, English": ("James", "Oliver", "Harry", "Thomas", "Edward", "Peter", "George", "Andrew"),
    "women, English": ("Emily", "Charlotte", "Alice", "Margaret", "Sarah", "Helen", "Rebecca", "Lucy"),
    "men, Arabic": ("Ahmed", "Mohammed", "Omar", "Khalid", "Yusuf", "Ibrahim", "Hassan", "Tariq"),
    "women, Arabic": ("Fatima", "Aisha", "Layla", "Zainab", "Mariam", "Noura", "Samira", "Huda"),
    "men, South Asian": ("Rajesh", "Arjun", "Vikram", "Sanjay", "Anil", "Suresh", "Rohan", "Deepak"),
    "women, South Asian": ("Priya", "Anjali", "Lakshmi", "Sunita", "Kavita", "Meera", "Divya", "Pooja"),
    "men, West African": ("Kwame", "Chidi", "Emeka", "Kofi", "Tunde", "Sekou", "Mamadou", "Oluwaseun"),
    "women, West African": ("Ngozi", "Amara", "Abena", "Folake", "Aminata", "Chioma", "Adwoa", "Fatou"),
    "men, East Asian": ("Wei", "Hiroshi", "Jun", "Kenji", "Minjun", "Haoran", "Takeshi", "Jianguo"),
    "women, East Asian": ("Mei", "Yuki", "Xiaoling", "Sakura", "Jiwoo", "Haruka", "Yanyan", "Soyeon"),
}
# Keys of a QWERTY keyboard and their neighbours, for typing errors.
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
