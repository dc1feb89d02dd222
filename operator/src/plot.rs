//! Pictures of plans as SVG, written by hand: they follow the reader's light or dark colour scheme.

use crate::pictures;
use joulecast_planner::plan::{Baseline, Candidate, Plan};
use joulecast_planner::units::Tokens;
use std::fmt::Write;

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 260.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 56.0;
/// Requests drawn at most, evenly picked.
const DOTS: usize = 4000;

/// A point of the front over zeta.
#[derive(Debug, Clone, Copy)]
pub struct FrontPoint {
    /// Weight of energy.
    pub zeta: f64,
    /// Joules of all requests.
    pub energy_j: f64,
    /// Token-weighted mean accuracy.
    pub accuracy: f64,
}

struct Picture {
    svg: String,
}

impl Picture {
    fn new(title: &str) -> Self {
        let mut svg = String::new();
        let _ = write!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\" role=\"img\"><title>{}</title>\n<style>svg{{color:#222}}.paper{{fill:#fff}}\
             text{{fill:currentColor}}.axis{{stroke:currentColor;fill:none}}.grid{{stroke:currentColor;opacity:.15}}\
             @media(prefers-color-scheme:dark){{svg{{color:#ddd}}.paper{{fill:#181818}}}}</style>\n\
             <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n",
            escape(title)
        );
        Self { svg }
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let _ = writeln!(self.svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text));
    }

    fn dot(&mut self, x: f64, y: f64, radius: f64, colour: &str, title: &str) {
        let _ = writeln!(
            self.svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"><title>{}</title></circle>",
            escape(title)
        );
    }

    fn axes(&mut self, across: &Axis, up: &Axis) {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for (value, label) in across.ticks() {
            let x = across.at(value);
            let _ = writeln!(self.svg, "<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom}\"/>");
            self.text(x, bottom + 18.0, "middle", &label);
        }
        for (value, label) in up.ticks() {
            let y = up.at(value);
            let _ = writeln!(self.svg, "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>");
            self.text(LEFT - 8.0, y + 4.0, "end", &label);
        }
        let _ = writeln!(self.svg, "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{right}\"/>");
        self.text((LEFT + right) / 2.0, HEIGHT - 12.0, "middle", across.title);
        let middle = (TOP + bottom) / 2.0;
        let _ = writeln!(
            self.svg,
            "<text transform=\"translate(16 {middle}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(up.title)
        );
    }

    fn finish(mut self) -> String {
        self.svg.push_str("</svg>\n");
        self.svg
    }
}

/// Maps values to a side of the picture.
struct Axis {
    title: &'static str,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Axis {
    fn scale(&self, value: f64) -> f64 {
        if self.log { (value + 1.0).log2() } else { value }
    }

    fn at(&self, value: f64) -> f64 {
        let (low, high) = (self.scale(self.low), self.scale(self.high));
        let part = if high > low { (self.scale(value) - low) / (high - low) } else { 0.5 };
        self.from + part * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        if self.log {
            let powers = (0..25).map(|p| f64::from(1u32 << p));
            let inside: Vec<f64> =
                std::iter::once(0.0).chain(powers).filter(|v| *v >= self.low && *v <= self.high).collect();
            let step = inside.len().div_ceil(8).max(1);
            return inside.iter().step_by(step).map(|v| (*v, format!("{v:.0}"))).collect();
        }
        let span = (self.high - self.low).max(f64::MIN_POSITIVE);
        let rough = 10f64.powf((span / 5.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|f| f * rough).find(|s| span / s <= 6.0).unwrap_or(span);
        let largest = self.low.abs().max(self.high.abs());
        let units = [(1e9, " G"), (1e6, " M"), (1e3, " k")].into_iter().find(|(unit, _)| largest >= 10.0 * unit);
        let (unit, sign) = units.unwrap_or((1.0, ""));
        let digits = (-(step / unit).log10().floor()).clamp(0.0, 9.0) as usize;
        let first = (self.low / step).ceil();
        (0..8)
            .map(|i| (first + f64::from(i)) * step)
            .filter(|v| *v <= self.high)
            .map(|v| (v, format!("{:.digits$}{sign}", v / unit)))
            .collect()
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A colour that is readable on light and dark ground: blues are lighter, because they look dark.
fn colour(k: usize, of: usize) -> String {
    let hue = 360.0 * k as f64 / of.max(1) as f64;
    let lightness = if (210.0..290.0).contains(&hue) { 0.66 } else { 0.5 };
    pictures::hex(hue, 0.65, lightness)
}

/// Energy against accuracy: the front over zeta and the baselines beside it.
#[must_use]
pub fn front(points: &[FrontPoint], baselines: &[Baseline]) -> String {
    let mut picture = Picture::new("Energy against accuracy: optimal plans over zeta, and simpler rules");
    let rules: Vec<(&Baseline, f64)> = baselines.iter().filter_map(|b| b.accuracy.map(|a| (b, a))).collect();
    let range = |values: &[f64]| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if low > high { (0.0, 1.0) } else { (low - 0.05 * (high - low), high + 0.05 * (high - low)) }
    };
    let joules: Vec<f64> = points.iter().map(|p| p.energy_j).chain(rules.iter().map(|(b, _)| b.energy.0)).collect();
    let scores: Vec<f64> = points.iter().map(|p| p.accuracy).chain(rules.iter().map(|(_, a)| *a)).collect();
    let ((low, high), (worst, best)) = (range(&joules), range(&scores));
    let across = Axis { title: "energy in joules", low, high, from: LEFT, to: WIDTH - RIGHT, log: false };
    let up = Axis {
        title: "token-weighted mean accuracy",
        low: worst,
        high: best,
        from: HEIGHT - BOTTOM,
        to: TOP,
        log: false,
    };
    picture.axes(&across, &up);
    let place = |p: &FrontPoint| (across.at(p.energy_j), up.at(p.accuracy));
    let line: Vec<String> = points.iter().map(place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(picture.svg, "<polyline class=\"axis\" stroke-width=\"1.5\" points=\"{}\"/>", line.join(" "));
    for point in points {
        let (x, y) = place(point);
        let title = format!("zeta {:.3}: {:.0} J, accuracy {:.4}", point.zeta, point.energy_j, point.accuracy);
        picture.dot(x, y, 3.0, "currentColor", &title);
    }
    picture.text(WIDTH - RIGHT + 16.0, TOP + 8.0, "start", "line: optimum over zeta");
    for (k, (rule, accuracy)) in rules.iter().enumerate() {
        let colour = colour(k, rules.len());
        let title = format!("{}: {:.0} J, accuracy {accuracy:.4}", rule.name, rule.energy.0);
        picture.dot(across.at(rule.energy.0), up.at(*accuracy), 5.0, &colour, &title);
        let y = TOP + 28.0 + 18.0 * k as f64;
        picture.dot(WIDTH - RIGHT + 20.0, y - 4.0, 5.0, &colour, &title);
        let kept = if rule.feasible { "" } else { " (breaks limits)" };
        picture.text(WIDTH - RIGHT + 32.0, y, "start", &format!("{}{kept}", rule.name));
    }
    picture.finish()
}

/// Requests in the (x, y) plane, coloured by the candidate that they go to. `assigned` names candidates by place.
#[must_use]
pub fn regions(requests: &[Tokens], assigned: &[u8], plan: &Plan, candidates: &[Candidate]) -> String {
    let mut picture = Picture::new("Which configuration each request goes to, by input and output tokens");
    let largest = |of: fn(&Tokens) -> u32| f64::from(requests.iter().map(of).max().unwrap_or(1));
    let (most_in, most_out) = (largest(|t| t.input), largest(|t| t.output));
    let across = Axis { title: "input tokens", low: 0.0, high: most_in, from: LEFT, to: WIDTH - RIGHT, log: true };
    let up = Axis { title: "output tokens", low: 0.0, high: most_out, from: HEIGHT - BOTTOM, to: TOP, log: true };
    picture.axes(&across, &up);
    for (tokens, k) in requests.iter().zip(assigned).step_by(requests.len().div_ceil(DOTS).max(1)) {
        let k = usize::from(*k);
        let (x, y) = (across.at(f64::from(tokens.input)), up.at(f64::from(tokens.output)));
        picture.dot(x, y, 2.0, &colour(k, candidates.len()), &candidates[k].name);
    }
    for (k, (candidate, placed)) in candidates.iter().zip(&plan.placements).enumerate() {
        let y = TOP + 10.0 + 18.0 * k as f64;
        picture.dot(WIDTH - RIGHT + 20.0, y - 4.0, 5.0, &colour(k, candidates.len()), &candidate.name);
        let text = format!("{}: {}", candidate.name, placed.moments.count);
        picture.text(WIDTH - RIGHT + 32.0, y, "start", &text);
    }
    picture.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_shows_every_point_and_escapes_names() {
        let point = |zeta: f64| FrontPoint { zeta, energy_j: 100.0 - 50.0 * zeta, accuracy: 0.9 - 0.2 * zeta };
        let rule = Baseline {
            name: "single:<a&b>".into(),
            rule: String::new(),
            feasible: true,
            objective: 0.0,
            energy: joulecast_planner::units::Joules(80.0),
            runtime: joulecast_planner::units::Seconds(1.0),
            accuracy: Some(0.8),
        };
        let svg = front(&[point(0.0), point(0.5), point(1.0)], &[rule]);
        assert!(svg.contains("single:&lt;a&amp;b&gt;") && !svg.contains("<a&b>"));
        assert_eq!(svg.matches("r=\"3\"").count(), 3);
        assert!(svg.contains("prefers-color-scheme"));
    }

    #[test]
    fn ticks_are_round_and_short() {
        let labels = |low: f64, high: f64, log: bool| -> Vec<String> {
            let axis = Axis { title: "", low, high, from: 0.0, to: 1.0, log };
            axis.ticks().into_iter().map(|(_, label)| label).collect()
        };
        assert_eq!(labels(7e6, 6.9e7, false), ["20 M", "40 M", "60 M"]);
        assert_eq!(labels(0.49, 0.66, false), ["0.50", "0.55", "0.60", "0.65"]);
        assert_eq!(labels(0.0, 300.0, true), ["0", "2", "8", "32", "128"]);
    }
}
