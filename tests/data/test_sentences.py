"""Where sentences end, by script and by language."""
# ruff: noqa: RUF001  (the texts are in their own scripts)

import builtins

import pytest

from fastbert.data.corpus import Skipped, read_corpus
from fastbert.data.sentences import LINE, script_of, split_sentences
from fastbert.errors import UserError

# Each text's sentences, as its readers part it.
BY_SCRIPT = {
    "Latin": ("", ["Mr. Smith came in 1990.", 'He said "Hi."', "Is it so? it is.", "Yes!"]),
    "Cyrillic": ("", ["Это первое.", "Это второе!", "А это?"]),
    "Greek": ("Greek", ["Τι κάνεις;", "Καλά είμαι."]),
    "Arabic": ("Arabic", ["هذا هو النص.", "هل هذا سؤال؟", "نعم!", "وهذه جملة."]),
    "Urdu": ("Arabic", ["یہ پہلا جملہ ہے۔", "یہ دوسرا ہے۔", "کیا؟"]),
    "Hebrew": ("Hebrew", ["זה משפט.", "עוד אחד?", "כן!"]),
    "Hindi": ("Devanagari", ["यह पहला वाक्य है।", "यह दूसरा है॥", "क्या यह प्रश्न है?"]),
    "Bengali": ("Bengali", ["এটা প্রথম।", "এটা দ্বিতীয়?"]),
    "Tamil": ("Tamil", ["இது முதல்.", "இது இரண்டாவது?"]),
    "Thai": ("Thai", ["ไม่มีข้อมูล", "สำหรับประเทศไทย", "ขอบคุณครับ 25 บาท"]),
    "Lao": ("Lao", ["ພາສາລາວ", "ເປັນພາສາ"]),
    "Khmer": ("Khmer", ["នេះជាប្រយោគ។", "ទីពីរ។"]),
    "Burmese": ("Burmese", ["ဒါဟာ ပထမ ဖြစ်သည်။", "ဒုတိယ ဖြစ်သည်။"]),
    "Tibetan": ("Tibetan", ["བོད་ཡིག།", "གཉིས་པ།"]),
    "Chinese": ("Chinese", ["这是第一句。", "这是第二句！", "真的吗？"]),
    "Japanese": ("Japanese", ["これは日本語の文です。", "次の文！"]),
    "Korean": ("Korean", ["안녕하세요.", "반갑습니다!"]),
    "Amharic": ("Ethiopic", ["ሰላም።", "እንዴት ነህ፧"]),
    "Armenian": ("Armenian", ["Բարեւ։", "Ինչպես ես։"]),
    "Georgian": ("Georgian", ["ეს არის.", "მეორე!"]),
}


@pytest.mark.parametrize(("script", "sentences"), BY_SCRIPT.values(), ids=BY_SCRIPT)
def test_sentences_by_script(script, sentences):
    space = "" if script in ("Chinese", "Japanese") else " "
    text = space.join(sentences)
    assert script_of(text)[1] == script
    assert split_sentences(text) == sentences
    assert split_sentences(f"  {text}\n") == sentences


NOT_ENDS = [
    ["তারিখ ১৬.১২.১৯৭১ ছিল।", "হ্যাঁ।"],
    ["कीमत ३.५ रुपये है।", "डॉ. शर्मा आए।", "ठीक।"],
    ["قیمت ۳.۵ است.", "د. علی آمد.", "بله."],
    ["ร.ต.อ.สมชาย", "พ.ศ.2554"],
    ["날짜는 2020. 5. 5.", "좋다."],
    ["А. С. Пушкин и М. Ю. Лермонтов.", "Конец."],
    ["តម្លៃ ៣.៥ ដុល្លារ។", "ទីពីរ។"],
    ["ሰላም፡፡", "እንዴት ነህ፧"],
    ["Oui…", "C'est tout.", "Fin."],
]


@pytest.mark.parametrize("sentences", NOT_ENDS)
def test_a_full_stop_inside_a_number_or_a_name_ends_nothing(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_a_few_foreign_letters_change_nothing():
    text = "The angle α is π/2. In Thai it is มุม. Done."
    assert script_of(text) == ("", "")
    assert split_sentences(text) == ["The angle α is π/2.", "In Thai it is มุม.", "Done."]


def test_language_named():
    text = "Am 5. Mai kam Dr. Müller. Er ging."
    assert split_sentences(text, "de") == ["Am 5. Mai kam Dr. Müller.", "Er ging."]
    assert split_sentences("ไทย ไทย", "th") == ["ไทย", "ไทย"]


def test_a_line_is_a_sentence_where_it_is_said():
    assert split_sentences(" One. Two. ", LINE) == ["One. Two."]
    assert split_sentences(" \t ", LINE) == []


@pytest.mark.parametrize(
    ("splitter", "sentences", "note"),
    [
        ("auto", ["Am 5.", "Mai.", "这是。", "好。"], "Chinese text was split into sentences"),
        ("line", ["Am 5. Mai.", "这是。好。"], "each line was taken as one sentence"),
        ("de", ["Am 5. Mai.", "这是。", "好。"], "by sentencex, for the language 'de'"),
        (
            "zh",
            ["Am 5.", "Mai.", "这是。", "好。"],
            "has no rules of its own for it, for the language 'zh'",
        ),
    ],
)
def test_a_corpus_says_how_it_was_split(tmp_path, splitter, sentences, note):
    path = tmp_path / "corpus.txt"
    path.write_text("Am 5. Mai.\n这是。好。\n", encoding="utf-8")
    report = Skipped()
    assert list(read_corpus(str(path), report, splitter=splitter)) == [sentences]
    assert any(note in line for line in report.notes)


@pytest.mark.parametrize("splitter", ["auto", "th", "en"])
def test_nothing_is_lost(splitter):
    text = " ".join(" ".join(sentences) for _, sentences in BY_SCRIPT.values())
    parts = split_sentences(text, splitter)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_a_script_that_begins_late_decides_where_it_prevails():
    sentences = ["यह पहला वाक्य है।", "यह दूसरा है।"] * 20
    found = split_sentences("word " * 60 + " ".join(sentences))
    assert found[1:] == sentences[1:]
    assert split_sentences("One. " + " ".join(sentences)) == ["One.", *sentences]


@pytest.mark.parametrize(
    "text",
    [
        "这是第一句。这是第二句！",
        "これは文です。次の文！",
        "ሰላም።እንዴት ነህ፧",
        "यह है।यह।",
        "क.ख.",
        "这是",
    ],
)
def test_a_megabyte_without_spaces_is_split_and_kept(text):
    whole = text * (10**6 // len(text.encode()))  # 25 s where the time grew with the square
    assert "".join("".join(split_sentences(whole)).split()) == "".join(whole.split())


@pytest.mark.parametrize("text", ["." * 10**6, "。" * 10**6, "ก " * 10**5, '("' * 10**5])
def test_long_lines_take_linear_time(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_a_missing_library_is_told(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "sentencex":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert split_sentences("One. Two.") == ["One.", "Two."]
    with pytest.raises(UserError, match="pip install sentencex"):
        split_sentences("これは文です。")
