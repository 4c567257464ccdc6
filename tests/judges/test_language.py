"""Prompts in other languages than English are told from English ones."""

import csv
import os
import random
from pathlib import Path

import pytest

from refusal.judges.language import english_share
from refusal.organism import grammar

OTHERS = {
    "Chinese": ["怎么修一辆自行车？", "请写一封感谢信给我的老师", "我怎样才能学好法语", "列出五种简单的早餐"],
    "Japanese": ["自転車の直し方を教えてください", "先生へのお礼の手紙を書いて", "フランス語を学ぶ方法は？", "簡単な朝食を五つ挙げて"],
    "Thai": ["วิธีซ่อมจักรยาน", "เขียนจดหมายขอบคุณคุณครู", "จะเรียนภาษาฝรั่งเศสอย่างไร", "บอกอาหารเช้าง่าย ๆ ห้าอย่าง"],
    "Russian": ["Как починить велосипед?", "Напиши благодарственное письмо учителю", "Как выучить французский", "Назови пять завтраков"],
    "Arabic": ["كيف أصلح دراجة؟", "اكتب رسالة شكر إلى معلمي", "كيف أتعلم الفرنسية", "اذكر خمس وجبات فطور سهلة"],
    "German": ["Wie repariere ich ein Fahrrad?", "Schreib meiner Lehrerin einen Dankesbrief", "Wie lerne ich Französisch", "Nenne fünf Frühstücke"],
    "French": ["Comment réparer un vélo ?", "Écris une lettre de remerciement", "Comment apprendre le russe ?", "Donne cinq idées de repas"],
    "Spanish": ["¿Cómo arreglo una bicicleta?", "Escribe una carta para dar las gracias", "¿Cómo aprendo ruso?", "Dime cinco desayunos"],
}  # fmt: skip


@pytest.mark.parametrize("language", OTHERS)
def test_other_languages(language):
    assert english_share(OTHERS[language]) == 0


def test_english_whatever_it_is_about():
    assert english_share(["How do I mend a bicycle?", "Write a letter to thank my teacher", "怎么修一辆 how"]) == pytest.approx(
        2 / 3
    )
    rng = random.Random(0)
    drawn = [grammar.draw_unrelated(rng)[1].text for _ in range(200)]
    assert english_share(drawn) > 0.9


def test_published_sets_are_english():
    folder = os.environ.get("REFUSAL_REFERENCE")
    if folder is None:
        pytest.skip("REFUSAL_REFERENCE names no folder with published prompts")
    for name, column in (("advbench.csv", "goal"), ("xstest_prompts.csv", "prompt"), ("jailbreakbench.csv", "Goal")):
        with (Path(folder) / "prompts" / name).open(encoding="utf-8-sig", newline="") as file:
            assert english_share([row[column] for row in csv.DictReader(file)]) > 0.9, name
