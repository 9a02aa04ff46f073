"""Figures as SVG, without a library: points or lines of several series on linear or logarithmic axes."""
import math
from xml.sax.saxutils import escape

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa7700", "#66ccee", "#aa3377", "#777777", "#000000", "#88aa22", "#cc6600",
           "#5500aa", "#009988", "#bb0044", "#3355ff", "#997755", "#44bb99", "#ff77aa", "#556600")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 70, 190, 34, 46


def ticks(low, high, log):
    if log:
        all_of = [m * 10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
        return [t for t in all_of if low <= t <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(title, x_title, y_title, series, log_x=False, log_y=False, lines=False):
    """SVG text. `series`: name -> [(x, y, label or "")], labels as tooltips; points that an axis can't show are left out."""
    shown = {name: [p for p in points if all(math.isfinite(v) and (v > 0 or not log) for v, log in ((p[0], log_x), (p[1], log_y)))]
             for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        raise ValueError(f"{title}: no point to draw")

    def axis(values, log, start, end):
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.2, high * 1.2
        else:
            pad = 0.04 * (high - low) or 0.5
            low, high = low - pad, high + pad
        of = math.log10 if log else float
        return low, high, lambda v: start + (of(v) - of(low)) / (of(high) - of(low)) * (end - start)
    points = [p for s in shown.values() for p in s]
    x_low, x_high, at_x = axis([p[0] for p in points], log_x, LEFT, WIDTH - RIGHT)
    y_low, y_high, at_y = axis([p[1] for p in points], log_y, HEIGHT - BOTTOM, TOP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>']
    for t in ticks(x_low, x_high, log_x):
        out += [f'<path d="M{at_x(t):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dddddd"/>',
                f'<text x="{at_x(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{t:g}</text>']
    for t in ticks(y_low, y_high, log_y):
        out += [f'<path d="M{LEFT} {at_y(t):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>',
                f'<text x="{LEFT - 6}" y="{at_y(t) + 4:.1f}" text-anchor="end">{t:g}</text>']
    out += [f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_title)}</text>',
            f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>']
    for i, (name, of_one) in enumerate(shown.items()):
        colour = COLOURS[i % len(COLOURS)]
        if lines:
            path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y, _ in of_one)
            out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4" fill="{colour}" fill-opacity="0.8"><title>{escape(label or name)}'
                f'</title></circle>' for x, y, label in of_one]
        y = TOP + 8 + 17 * i
        out += [f'<circle cx="{WIDTH - RIGHT + 16}" cy="{y}" r="4" fill="{colour}"/>',
                f'<text x="{WIDTH - RIGHT + 26}" y="{y + 4}">{escape(name)}</text>']
    return "\n".join([*out, "</svg>", ""])
