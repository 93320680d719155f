//! A job's loss curve as an SVG picture: the training loss of every step, a smoothed line through it, and the validation
//! loss where it was taken.
//!
//! The picture is plain text without script or links. However many steps there are, a line keeps the lowest and the highest
//! value of each column of pixels: it looks as if every step were drawn, and no peak is lost.

use crate::store::metric::Losses;

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 440.0;
/// Edges of the area that the curves are in.
const LEFT: f64 = 68.0;
const RIGHT: f64 = WIDTH - 36.0;
const TOP: f64 = 76.0;
const BOTTOM: f64 = HEIGHT - 52.0;
/// Most characters of a text in the picture; longer ones are cut.
const MOST_CHARACTERS: usize = 100;
/// Losses further from 0 are drawn here.
const LARGEST: f64 = 1e12;
/// Steps from which a smoothed line says more than the steps themselves.
const SMOOTHED_FROM: usize = 5;

const STYLE: &str = "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:12px;fill:#57606a}\
.title{font-size:16px;font-weight:600;fill:#1f2328}\
.grid{stroke:#e4e7eb}.axis{stroke:#8c959f}\
.train,.smooth{fill:none;stroke-linejoin:round;stroke-linecap:round}\
.train{stroke:#a9c4e8}.smooth{stroke:#1f5fa8;stroke-width:2.25}\
.valid{fill:#d9571e;stroke:#fff}.single{fill:#1f5fa8}";

/// The picture.
pub(super) fn draw(title: &str, caption: &str, losses: &[Losses]) -> String {
    let (title, caption) = (escaped(title), escaped(caption));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\n\
         <title>Loss of {title}</title>\n<style>{STYLE}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"32\">{title}</text>\n<text x=\"{LEFT}\" y=\"52\">{caption}</text>\n"
    );
    let train: Vec<Point> = losses.iter().filter_map(|row| point(row.step, row.train_loss)).collect();
    let valid: Vec<Point> = losses.iter().filter_map(|row| point(row.step, row.valid_loss?)).collect();
    match Axes::around(&train, &valid) {
        None => {
            let (x, y) = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
            svg.push_str(&format!(
                "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">No step has been trained yet</text>\n"
            ));
        }
        Some(axes) => {
            axes.draw(&mut svg);
            let mut shown = Vec::new();
            if let [only] = train[..] {
                let (x, y) = axes.place(only);
                svg.push_str(&format!("<circle class=\"single\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>\n"));
                shown.push(("single", "training loss"));
            } else if !train.is_empty() {
                svg.push_str(&line("train", &axes.thinned(&train)));
                shown.push(("train", "training loss"));
            }
            if train.len() >= SMOOTHED_FROM {
                svg.push_str(&line("smooth", &axes.thinned(&smoothed(&train))));
                shown.push(("smooth", "smoothed"));
            }
            for (x, y) in axes.thinned(&valid) {
                svg.push_str(&format!("<circle class=\"valid\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>\n"));
            }
            if !valid.is_empty() {
                shown.push(("valid", "validation loss"));
            }
            legend(&mut svg, &shown);
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// A step and its loss.
type Point = (f64, f64);

fn point(step: i64, loss: f64) -> Option<Point> {
    loss.is_finite().then(|| (step as f64, loss.clamp(-LARGEST, LARGEST)))
}

/// An average that forgets: it weighs a step by how far away it is, over about a twentieth of the run, before and after it.
/// One that looked back alone would lag behind a falling loss.
fn smoothed(points: &[Point]) -> Vec<Point> {
    let before = forgetting(points.iter());
    let mut after = forgetting(points.iter().rev());
    after.reverse();
    let sides = before.iter().zip(&after);
    let means = sides.map(|(before, after)| (before.sum + after.sum) / (before.weight + after.weight));
    points.iter().zip(means).map(|(point, mean)| (point.0, mean)).collect()
}

/// What is remembered of the losses up to a step. The weight tells how many they were: near an end of the run one side of a
/// step has few, and counts as much less.
#[derive(Debug, Clone, Copy, Default)]
struct Memory {
    sum: f64,
    weight: f64,
}

fn forgetting<'a>(points: impl ExactSizeIterator<Item = &'a Point>) -> Vec<Memory> {
    let span = (points.len() as f64 / 20.0).max(5.0);
    let keep = 1.0 - 2.0 / (span + 1.0);
    let mut memory = Memory::default();
    let memories = points.map(|(_, loss)| {
        memory.sum = keep * memory.sum + (1.0 - keep) * loss;
        memory.weight = keep * memory.weight + (1.0 - keep);
        memory
    });
    memories.collect()
}

/// One axis: its ends, and where its labels are.
struct Axis {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
    /// Distance of two ticks.
    step: f64,
}

impl Axis {
    /// An axis of at most `most` intervals of 1, 2 or 5 times a power of ten, each at least `least`.
    fn new(low: f64, high: f64, most: f64, least: f64) -> Self {
        let raw = ((high - low) / most).max(least);
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0].iter().map(|digit| digit * power).find(|step| *step >= raw * (1.0 - 1e-9));
        let step = step.unwrap_or(10.0 * power);
        // A tick at an end of the axis is not lost to rounding.
        let (first, last) = ((low / step - 1e-6).ceil() as i64, (high / step + 1e-6).floor() as i64);
        Self { low, high, ticks: (first..=last).map(|count| count as f64 * step).collect(), step }
    }

    /// Where between the ends a value is, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }
}

struct Axes {
    steps: Axis,
    losses: Axis,
}

impl Axes {
    /// The axes on which all of these points are; `None`: there are none.
    fn around(train: &[Point], valid: &[Point]) -> Option<Self> {
        let ends = |value: fn(&Point) -> f64| {
            let values = || train.iter().chain(valid).map(value);
            Some((values().min_by(f64::total_cmp)?, values().max_by(f64::total_cmp)?))
        };
        let (first, last) = ends(|point| point.0)?;
        let (lowest, highest) = ends(|point| point.1)?;
        let around = if first == last { 1.0 } else { 0.0 };
        let mut steps = Axis::new(first - around, last + around, 10.0, 1.0);
        steps.ticks.retain(|tick| (first..=last).contains(tick));
        let room = ((highest - lowest) * 0.04).max(highest.abs() * 0.02).max(1e-6);
        let mut losses = Axis::new(lowest - room, highest + room, 6.0, f64::MIN_POSITIVE);
        if lowest >= 0.0 && losses.low < 0.0 {
            losses.low = 0.0;
            losses.ticks.retain(|tick| *tick >= 0.0);
        }
        Some(Self { steps, losses })
    }

    /// Where in the picture a point is.
    fn place(&self, (step, loss): Point) -> (f64, f64) {
        let x = LEFT + self.steps.share(step) * (RIGHT - LEFT);
        let y = BOTTOM - self.losses.share(loss) * (BOTTOM - TOP);
        (x, y)
    }

    /// The points' places, of each column of pixels the lowest and the highest.
    fn thinned(&self, points: &[Point]) -> Vec<(f64, f64)> {
        let places: Vec<(f64, f64)> = points.iter().map(|point| self.place(*point)).collect();
        let columns = places.chunk_by(|one, next| one.0.floor() == next.0.floor());
        let mut kept = Vec::new();
        for column in columns {
            let low = (0..column.len()).min_by(|one, other| column[*one].1.total_cmp(&column[*other].1));
            let high = (0..column.len()).max_by(|one, other| column[*one].1.total_cmp(&column[*other].1));
            let (Some(low), Some(high)) = (low, high) else { continue };
            kept.push(column[low.min(high)]);
            if low != high {
                kept.push(column[low.max(high)]);
            }
        }
        kept
    }

    fn draw(&self, svg: &mut String) {
        for &loss in &self.losses.ticks {
            let (_, y) = self.place((self.steps.low, loss));
            let label = loss_label(loss, self.losses.step);
            svg.push_str(&format!(
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>\n",
                LEFT - 10.0,
                y + 4.0,
            ));
        }
        for &step in &self.steps.ticks {
            let (x, _) = self.place((step, self.losses.low));
            let label = step_label(step);
            svg.push_str(&format!(
                "<path class=\"axis\" d=\"M{x:.1} {BOTTOM}v5\"/><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>\n",
                BOTTOM + 20.0,
            ));
        }
        let (middle, height) = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
        svg.push_str(&format!(
            "<path class=\"axis\" d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/>\n\
             <text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">step</text>\n\
             <text transform=\"translate(18 {height}) rotate(-90)\" text-anchor=\"middle\">loss</text>\n",
            HEIGHT - 12.0,
        ));
    }
}

fn line(class: &str, places: &[(f64, f64)]) -> String {
    let points: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    format!("<polyline class=\"{class}\" points=\"{}\"/>\n", points.join(" "))
}

/// What the curves are, beside the title, the last one at the right edge.
fn legend(svg: &mut String, shown: &[(&str, &str)]) {
    let mut right = RIGHT;
    for (class, name) in shown.iter().rev() {
        // Of the letters of this size, six and a half pixels each are enough.
        let x = right - 6.5 * name.len() as f64;
        let sign = match *class {
            "valid" | "single" => format!("<circle class=\"{class}\" cx=\"{}\" cy=\"28\" r=\"4\"/>", x - 12.0),
            _ => format!("<path class=\"{class}\" d=\"M{} 28h18\"/>", x - 24.0),
        };
        svg.push_str(&format!("{sign}<text x=\"{x}\" y=\"32\">{name}</text>\n"));
        right = x - 44.0;
    }
}

/// A loss with as many digits as its neighbours differ in.
fn loss_label(loss: f64, step: f64) -> String {
    let decimals = (-step.log10() - 1e-9).ceil().max(0.0);
    if loss.abs() >= 1e6 || decimals > 6.0 { format!("{loss:.1e}") } else { format!("{loss:.*}", decimals as usize) }
}

/// A step with its thousands apart.
fn step_label(step: f64) -> String {
    let digits = format!("{step:.0}");
    let mut label = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            label.push(',');
        }
        label.push(digit);
    }
    label
}

/// A text as XML takes it, cut to what fits into the picture.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == MOST_CHARACTERS {
            escaped.push('…');
            break;
        }
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Not even escaped may these be in XML.
            '\u{0}'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(count: i64, loss: impl Fn(i64) -> f64, valid_every: i64) -> Vec<Losses> {
        let row = |step| Losses {
            step,
            train_loss: loss(step),
            valid_loss: (step % valid_every == 0).then(|| loss(step) + 0.1),
        };
        (1..=count).map(row).collect()
    }

    /// Falling, with noise that is the same every time.
    fn falling(step: i64) -> f64 {
        1.0 + 1.5 * (-(step as f64) / 60.0).exp() + 0.08 * ((step * 7919 % 101) as f64 / 50.0 - 1.0)
    }

    #[test]
    fn no_step_one_step_and_a_flat_line_are_pictures() {
        assert!(draw("job", "model", &[]).contains("No step has been trained yet"));
        let one = draw("job", "model", &losses(1, falling, 1));
        assert!(one.contains("class=\"single\"") && one.contains("class=\"valid\"") && !one.contains("<polyline"));
        for level in [0.0, 2.5, 1e-9, 1e300] {
            let flat = draw("job", "model", &losses(30, |_| level, 10));
            assert_eq!(flat.matches("<polyline").count(), 2, "{level}");
            assert!(!flat.contains("NaN") && !flat.contains("inf"), "{level}: {flat}");
        }
        let broken = draw("job", "model", &losses(3, |_| f64::NAN, 1));
        assert!(broken.contains("No step has been trained yet"));
    }

    #[test]
    fn many_steps_make_no_larger_picture_and_keep_their_peaks() {
        let spike = |step: i64| if step == 77_777 { 9.0 } else { falling(step) };
        let losses = losses(100_000, spike, 1000);
        let svg = draw("job", "model", &losses);
        assert!(svg.len() < 80_000, "{} bytes", svg.len());
        let train: Vec<Point> = losses.iter().filter_map(|row| point(row.step, row.train_loss)).collect();
        let axes = Axes::around(&train, &[]).expect("points");
        let places = axes.thinned(&train);
        assert!(places.len() <= 2 * (RIGHT - LEFT + 1.0) as usize, "{} points", places.len());
        let (_, peak) = axes.place((77_777.0, 9.0));
        assert!(places.iter().any(|place| place.1 == peak));
        assert!(svg.contains(">100,000<"));
    }

    #[test]
    fn ticks_are_round_numbers_inside_the_axis() {
        let axis = Axis::new(0.93, 2.61, 6.0, f64::MIN_POSITIVE);
        let labels: Vec<String> = axis.ticks.iter().map(|tick| loss_label(*tick, axis.step)).collect();
        assert_eq!(labels, ["1.0", "1.5", "2.0", "2.5"]);
        let axis = Axis::new(1.0, 60.0, 10.0, 1.0);
        let labels: Vec<String> = axis.ticks.iter().map(|tick| step_label(*tick)).collect();
        assert_eq!(labels, ["10", "20", "30", "40", "50", "60"]);
        assert_eq!(Axis::new(1.0, 3.0, 10.0, 1.0).ticks, [1.0, 2.0, 3.0]);
        assert_eq!((loss_label(0.05, 0.05), loss_label(2e7, 1e7)), ("0.05".into(), "2.0e7".into()));
    }

    #[test]
    fn the_smoothed_line_neither_lags_nor_leads() {
        let line: Vec<Point> = (1..=400).map(|step| (f64::from(step), 5.0 - f64::from(step) / 100.0)).collect();
        let middle = &smoothed(&line)[100..300];
        assert!(middle.iter().zip(&line[100..300]).all(|(smooth, exact)| (smooth.1 - exact.1).abs() < 1e-2));
        let noise: Vec<Point> = (1..=400).map(|step| (f64::from(step), f64::from(step % 2))).collect();
        assert!(smoothed(&noise).iter().all(|(_, loss)| (loss - 0.5).abs() < 0.1));
    }

    #[test]
    fn texts_cannot_leave_their_place() {
        let svg = draw("</text><script>", "a\"b'c&d\u{8}\u{ffff}", &[]);
        assert!(svg.contains("&lt;/text&gt;&lt;script&gt;") && svg.contains("a&quot;b&#39;c&amp;d\u{fffd}\u{fffd}"));
        assert!(draw(&"x".repeat(500), "", &[]).contains(&format!(">{}…<", "x".repeat(MOST_CHARACTERS))));
    }
}
