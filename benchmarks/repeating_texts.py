"""Texts whose answers repeat much of what was asked, and one whose answer does not: (name, prompt, answer)."""

from __future__ import annotations

_ARTICLE = """请用一段话概括下面的会议记录，写明谁负责什么。

会议记录：四月十二日上午，清河市图书馆的欧阳若兰主持了新馆搬迁协调会。
参加会议的有技术部的司徒建业、古籍部的诸葛文澜、读者服务部的陈小满，以及承运方远山物流公司的项目经理阿卜杜拉·买买提。
欧阳若兰首先介绍了搬迁的总体安排：普通图书从五月六日开始装箱，五月二十日之前全部运到滨河路三百一十八号的新馆；
古籍和地方志最后搬运，由诸葛文澜负责清点和押运。
诸葛文澜提出，古籍部有一千二百六十册善本需要恒温恒湿的运输箱，远山物流公司目前只有十八个这样的箱子。
阿卜杜拉·买买提表示，公司可以从省城的分公司再调二十四个恒温恒湿的运输箱，四月三十日之前送到。
司徒建业说，新馆的检索系统要在五月十五日之前完成迁移，迁移期间网上续借和预约暂停三天。
陈小满建议提前两周在门口和网站上张贴通知，并把五月到期的图书统一延期到六月十日。
欧阳若兰同意了这些建议，要求各部门在四月二十日之前交出详细的计划。

概括："""
_SUMMARY = """清河市图书馆的欧阳若兰主持了新馆搬迁协调会，要求各部门在四月二十日之前交出详细的计划。
普通图书从五月六日开始装箱，五月二十日之前全部运到滨河路三百一十八号的新馆。
古籍部的诸葛文澜负责古籍和地方志的清点和押运，一千二百六十册善本需要恒温恒湿的运输箱；
远山物流公司的阿卜杜拉·买买提负责从省城的分公司再调二十四个恒温恒湿的运输箱，四月三十日之前送到。
技术部的司徒建业负责在五月十五日之前完成检索系统的迁移，迁移期间网上续借和预约暂停三天。
读者服务部的陈小满负责提前两周在门口和网站上张贴通知，并把五月到期的图书统一延期到六月十日。"""

_CODE = '''def read_measurements(path, separator=","):
    """Read one measurement per line: station, hour, temperature."""
    measurements = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            station, hour, temperature = line.strip().split(separator)
            measurements.append((station, int(hour), float(temperature)))
    return measurements


def hourly_means(measurements):
    """The mean temperature of every station and hour."""
    sums, counts = {}, {}
    for station, hour, temperature in measurements:
        key = (station, hour)
        sums[key] = sums.get(key, 0.0) + temperature
        counts[key] = counts.get(key, 0) + 1
    return {key: sums[key] / counts[key] for key in sums}


def warmest_hour(measurements, station):
    """The hour with the highest mean temperature of one station."""
    means = hourly_means(measurements)
    hours = {hour: mean for (name, hour), mean in means.items() if name == station}
    return max(hours, key=hours.get)
'''
_EDITED = _CODE.replace("temperature", "pressure").replace("warmest_hour", "hour_of_highest_pressure")
_FIXED = _CODE.replace(
    "        for line in file:\n",
    '        for line in file:\n            if not line.strip() or line.startswith("#"):\n                continue\n',
)

_NEWS = """Translate the names exactly as they are written and the rest into Chinese.

Greta Oberhauser-Lind and Tomasz Wierzbicki presented the Krakenfjord Observatory in Trondheim on Monday.
The Krakenfjord Observatory was designed by Studio Vandersloot & Achterberg and paid for by the Hjalmarsson Foundation.
Tomasz Wierzbicki said that the telescope of the Krakenfjord Observatory would find comets that Pan-STARRS had missed.
Greta Oberhauser-Lind thanked the Hjalmarsson Foundation.

"""
_TRANSLATION = """周一，Greta Oberhauser-Lind 和 Tomasz Wierzbicki 在 Trondheim 介绍了 Krakenfjord Observatory。
Krakenfjord Observatory 由 Studio Vandersloot & Achterberg 设计，由 Hjalmarsson Foundation 出资。
Tomasz Wierzbicki 说，Krakenfjord Observatory 的望远镜会找到 Pan-STARRS 巡天漏掉的彗星。
Greta Oberhauser-Lind 感谢了 Hjalmarsson Foundation。"""

_QUESTION = "为什么秋天树叶会变黄？\n\n"
_EXPLANATION = """树叶在春夏两季是绿的，因为里面有大量叶绿素。
到了秋天，白昼变短，气温下降，树木不再制造新的叶绿素，原有的也慢慢分解。
一直藏在底下的类胡萝卜素就显露出来，于是我们看到黄色和橙色。
有些树种此时还会生成花青素，叶子便成了红色。
最后叶柄基部长出一层隔离的细胞，水分供应中断，叶片枯干落下，树木以此减少冬季的消耗。"""

TEXTS = [
    ("summary with names", _ARTICLE, _SUMMARY),
    ("code, a check added", f"{_CODE}\nSkip empty lines and comments:\n\n", _FIXED),
    ("code, names changed", f"{_CODE}\nThe same for pressure instead of temperature:\n\n", _EDITED),
    ("translation with names", _NEWS, _TRANSLATION),
    ("explanation, nothing repeats", _QUESTION, _EXPLANATION),
]
