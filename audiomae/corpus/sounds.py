"""Twelve kinds of sound that a person tells apart, each drawn anew from a random generator.

A recipe takes `(rng, rate, n)` and gives float64[n] of any level. What makes the class is a pattern in time and
frequency (rising or falling, regular or random, harmonic or not); pitch, tempo, density and timbre are drawn from wide
ranges that overlap between classes, so that a mean spectrum does not give the class away.
"""

from collections.abc import Callable

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

Recipe = Callable[[np.random.Generator, int, int], np.ndarray]

VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))  # a i u e o, Hz
BELL_PARTIALS = np.array([0.5, 1.0, 1.19, 1.56, 2.0, 2.51, 2.66, 3.01, 4.1])


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A draw whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _tone(frequency: np.ndarray, rate: int, harmonics: np.ndarray) -> np.ndarray:
    """A tone of time-varying frequency (Hz) with the given harmonic amplitudes, silent above 0.45 of the rate."""
    phase = 2 * np.pi * np.cumsum(frequency) / rate
    out = np.zeros(len(frequency))
    for order, amplitude in enumerate(harmonics, 1):
        out += amplitude * np.sin(order * phase) * (order * frequency < 0.45 * rate)
    return out


def _harmonics(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.2, 1.0) ** np.arange(int(rng.integers(1, 6)))


def _hits(
    rng: np.random.Generator, rate: int, n: int, times: np.ndarray, sound: Callable[[], np.ndarray]
) -> np.ndarray:
    """Sounds laid at the given times (s), each with a level of its own."""
    out = np.zeros(n)
    for time in times:
        start = int(time * rate)
        one = sound()[: max(0, n - start)]
        out[start : start + len(one)] += rng.uniform(0.4, 1.0) * one
    return out


def _regular(rng: np.random.Generator, rate: int, n: int, per_second: float, jitter: float) -> np.ndarray:
    period = 1 / per_second
    times = np.arange(rng.uniform(0, min(period, 0.5 * n / rate)), n / rate, period)
    return np.abs(times + rng.normal(0, jitter * period, len(times)))


def _sweeps(rng: np.random.Generator, rate: int, n: int, rising: bool) -> np.ndarray:
    low = log_uniform(rng, 180, 1200)
    high = min(low * rng.uniform(1.6, 3.5), 0.42 * rate)
    length = int(rate * min(log_uniform(rng, 0.12, 0.9), 0.9 * n / rate)) + 1
    curve = np.linspace(0, 1, length) ** rng.uniform(0.6, 1.6)
    frequency = low * (high / low) ** (curve if rising else curve[::-1])
    one = _tone(frequency, rate, _harmonics(rng)) * np.hanning(length) ** 0.3
    gap = length / rate + rng.uniform(0.02, 0.5)
    return _hits(rng, rate, n, _regular(rng, rate, n, 1 / gap, 0.0), lambda: one)


def chirp_up(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Tones that rise, again and again."""
    return _sweeps(rng, rate, n, rising=True)


def chirp_down(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Tones that fall, again and again."""
    return _sweeps(rng, rate, n, rising=False)


def siren(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """One tone that slowly goes up and down."""
    time = np.arange(n) / rate
    centre, depth, speed = log_uniform(rng, 350, 1500), rng.uniform(0.2, 0.45), log_uniform(rng, 0.5, 2.5)
    frequency = centre * (1 + depth * np.sin(2 * np.pi * speed * time + rng.uniform(0, 2 * np.pi)))
    return _tone(frequency, rate, _harmonics(rng))


def tremolo(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """A steady pitch whose loudness swells and fades."""
    time = np.arange(n) / rate
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * log_uniform(rng, 3, 14) * time + rng.uniform(0, 2 * np.pi))
    return _tone(np.full(n, log_uniform(rng, 150, 2000)), rate, _harmonics(rng)) * swell ** rng.uniform(0.7, 2)


def warble(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """A pitch that trembles fast, its loudness steady."""
    time = np.arange(n) / rate
    depth, speed = rng.uniform(0.05, 0.15), log_uniform(rng, 6, 18)
    frequency = log_uniform(rng, 250, 2000) * (1 + depth * np.sign(np.sin(2 * np.pi * speed * time)))
    return _tone(frequency, rate, _harmonics(rng))


def clicks(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Short dry clicks at an even beat."""
    length = int(0.02 * rate)
    time = np.arange(length) / rate
    ring = np.sin(2 * np.pi * min(log_uniform(rng, 600, 4000), 0.42 * rate) * time) * np.exp(
        -time * rng.uniform(200, 600)
    )
    return _hits(rng, rate, n, _regular(rng, rate, n, log_uniform(rng, 3, 14), 0.01), lambda: ring)


def crackle(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Snaps at random moments, some far louder than others, as a fire has them."""
    count = max(3, int(log_uniform(rng, 8, 60) * n / rate))
    out = np.zeros(n)
    out[rng.integers(0, n, count)] = rng.pareto(1.5, count).clip(0, 12) * rng.choice([-1, 1], count)
    pole = np.exp(-2 * np.pi * log_uniform(rng, 60, 400) / rate)
    angle = 2 * np.pi * min(log_uniform(rng, 600, 4000), 0.42 * rate) / rate
    return lfilter([1.0], [1.0, -2 * pole * np.cos(angle), pole * pole], out)


def drum(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Beats of a skin: a low tone that sags in pitch, with a puff of noise."""
    length = int(rng.uniform(0.12, 0.35) * rate)
    time = np.arange(length) / rate
    low = log_uniform(rng, 60, 260)
    skin = np.sin(2 * np.pi * low * (time + 0.03 * (1 - np.exp(-time / 0.03)))) * np.exp(-time * rng.uniform(10, 25))
    puff = rng.standard_normal(length) * np.exp(-time * rng.uniform(40, 120)) * rng.uniform(0.1, 0.6)
    return _hits(rng, rate, n, _regular(rng, rate, n, log_uniform(rng, 1.5, 7), 0.06), lambda: skin + puff)


def pluck(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Plucked strings, a note at a time (Karplus and Strong, 1983)."""
    base, decay = log_uniform(rng, 110, 500), rng.uniform(0.985, 0.997)

    def note() -> np.ndarray:
        period = int(rate / (base * 2 ** (int(rng.integers(0, 13)) / 12)))
        loops = np.empty((int(0.8 * rate / period), period))
        loops[0] = rng.uniform(-1, 1, period)
        for turn in range(1, len(loops)):
            loops[turn] = decay / 2 * (loops[turn - 1] + np.roll(loops[turn - 1], 1))
        return loops.ravel()

    notes = [note() for _ in range(4)]
    return _hits(
        rng,
        rate,
        n,
        _regular(rng, rate, n, log_uniform(rng, 1.5, 6), 0.05),
        lambda: notes[int(rng.integers(len(notes)))],
    )


def bell(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Struck metal: partials out of harmony, the high ones fading first."""
    base, life = log_uniform(rng, 180, 900), rng.uniform(0.25, 1.0)
    partials = base * BELL_PARTIALS * rng.uniform(0.98, 1.02, len(BELL_PARTIALS))
    partials = partials[partials < 0.45 * rate]
    time = np.arange(int(2.5 * life * rate)) / rate
    levels = rng.uniform(0.3, 1.0, len(partials))
    strike = sum(
        level * np.sin(2 * np.pi * partial * time) * np.exp(-time / life * (partial / base) ** 0.7 * 2)
        for partial, level in zip(partials, levels, strict=True)
    )
    return _hits(rng, rate, n, _regular(rng, rate, n, log_uniform(rng, 0.8, 4), 0.05), lambda: np.asarray(strike))


def vowel(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """A voice that goes from vowel to vowel: a buzz through three formants (Peterson and Barney, 1952)."""
    time = np.arange(n) / rate
    pitch = log_uniform(rng, 90, 320) * (1 + 0.08 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * time + rng.uniform(0, 6)))
    phase = np.cumsum(pitch) / rate
    pulses = np.diff(np.floor(phase), prepend=0.0) + 0.02 * rng.standard_normal(n)
    size = rng.uniform(0.85, 1.25)  # of the head
    out = np.zeros(n)
    step = int(rng.uniform(0.15, 0.5) * rate)
    for start in range(0, n, step):
        voiced = pulses[start : start + step]
        for formant in VOWELS[int(rng.integers(len(VOWELS)))]:
            centre = formant * size
            if centre < 0.42 * rate:
                pole = np.exp(-np.pi * rng.uniform(60, 120) / rate)
                gain = (1 - pole) * 20
                coefficients = [1.0, -2 * pole * np.cos(2 * np.pi * centre / rate), pole * pole]
                out[start : start + step] += lfilter([gain], coefficients, voiced)
    syllables = 0.55 + 0.45 * np.sin(2 * np.pi * rng.uniform(1.5, 5) * time + rng.uniform(0, 6))
    return out * syllables


def wind(rng: np.random.Generator, rate: int, n: int) -> np.ndarray:
    """Noise in a band that rises and sinks in gusts."""
    time = np.arange(n) / rate
    out = np.zeros(n)
    for _ in range(3):
        centre = min(log_uniform(rng, 200, 2500), 0.35 * rate)
        band = butter(1, [0.7 * centre, 1.3 * centre], "bandpass", fs=rate, output="sos")
        gust = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.2, 1.2) * time + rng.uniform(0, 6))
        out += sosfilt(band, rng.standard_normal(n)) * gust ** rng.uniform(1, 3)
    return out


SOUNDS: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (bell, chirp_down, chirp_up, clicks, crackle, drum, pluck, siren, tremolo, vowel, warble, wind)
}


def coloured_noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """Background noise with a slope between blue and brown, at level 1."""
    tilt = rng.uniform(-0.5, 0.95)
    noise = lfilter([1.0], [1.0, -tilt], rng.standard_normal(n))
    return noise / np.sqrt(np.mean(noise**2))


def room(rng: np.random.Generator, rate: int, sound: np.ndarray) -> np.ndarray:
    """The sound in a room: four feedback combs, of a decay and wetness drawn for the clip."""
    wet = np.zeros_like(sound)
    keep = rng.uniform(0.3, 0.75)
    for delay_s in rng.uniform(0.011, 0.05, 4):
        delay = int(delay_s * rate)
        rows = np.pad(sound, (0, -len(sound) % delay)).reshape(-1, delay)  # a comb is one pole from row to row
        wet += lfilter([1.0], [1.0, -keep], rows, axis=0).ravel()[: len(sound)]
    return sound + rng.uniform(0, 0.4) * wet
