//! Pictures of fitted models as SVG: measured against predicted, residuals, and the cost surface, readable on light and
//! dark ground.

use joulecast_planner::fit::Group;
use joulecast_planner::predict::Predictor;
use joulecast_planner::samples::{Key, Sample, Samples};
use std::collections::BTreeMap;
use std::fmt::Write;

const SIDE: f64 = 220.0;
const LEFT: f64 = 62.0;
const GAP: f64 = 96.0;
const ROW: f64 = 310.0;
const TOP: f64 = 40.0;
const PANELS: f64 = 3.0;
/// Groups drawn at most; the picture says if there are more.
const GROUPS: usize = 12;
/// Points drawn at most in a panel, evenly picked.
const DOTS: usize = 2000;
/// Squares of a surface along each side.
const SQUARES: u32 = 24;

/// Energy and run time of every group, a row of three panels each.
#[must_use]
pub fn fit(groups: &[Group], samples: &BTreeMap<Key, Samples>) -> String {
    let mut body = String::new();
    let mut rows = 0;
    for group in groups.iter().take(GROUPS) {
        let Some(of_key) = samples.get(&group.key) else { continue };
        let own = |s: &&Sample| group.batch.is_none_or(|batch| batch == s.batch);
        let own: Vec<&Sample> = of_key.usable.iter().filter(own).collect();
        type Value = fn(&Sample) -> Option<f64>;
        let quantities: [(&str, &str, Value); 2] = [("energy", "J", |s| s.energy), ("run time", "s", |s| s.runtime)];
        for (name, unit, value) in quantities {
            if let Some(row) = Row::new(group, &own, name, unit, value) {
                row.draw(&mut body, TOP + ROW * f64::from(rows) + 20.0);
                rows += 1;
            }
        }
    }
    if groups.len() > GROUPS {
        let y = TOP + ROW * f64::from(rows);
        let _ = writeln!(body, "<text x=\"8\" y=\"{y}\">{} more groups are not drawn</text>", groups.len() - GROUPS);
    }
    let (width, height) = (PANELS * (LEFT + SIDE + 20.0) + GAP, TOP + ROW * f64::from(rows) + 20.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\" role=\"img\"><title>Fitted models: measured against predicted, residuals, surface</title>\n\
         <style>svg{{color:#222}}.paper{{fill:#fff}}text{{fill:currentColor}}.axis{{stroke:currentColor;fill:none}}\
         .grid{{stroke:currentColor;opacity:.15}}.dot{{fill:#3b7dd8;fill-opacity:.6}}.wrong{{fill:#d9534f}}\
         @media(prefers-color-scheme:dark){{svg{{color:#ddd}}.paper{{fill:#181818}}}}</style>\n\
         <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
    )
}

/// A measured point with what is predicted for it.
struct Dot {
    tau_in: f64,
    tau_out: f64,
    measured: f64,
    predicted: f64,
    wrong: bool,
}

struct Row {
    title: String,
    unit: String,
    dots: Vec<Dot>,
    /// Predicts the quantity at (tau_in, tau_out), for the surface.
    surface: Predictor,
    of_energy: bool,
}

impl Row {
    fn new(
        group: &Group,
        samples: &[&Sample],
        name: &str,
        unit: &str,
        value: fn(&Sample) -> Option<f64>,
    ) -> Option<Self> {
        let of_energy = name == "energy";
        let mut predictors: BTreeMap<u64, Predictor> = BTreeMap::new();
        let mut dots = vec![];
        for sample in samples.iter().step_by(samples.len().div_ceil(DOTS).max(1)) {
            let Some(measured) = value(sample) else { continue };
            let predictor = match predictors.entry(sample.batch.to_bits()) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => {
                    new.insert(group.predictor(Some(sample.batch)).ok()?)
                }
            };
            let (tau_in, tau_out) = (sample.tau_in, sample.tau_out);
            let predicted = at(predictor, of_energy, tau_in, tau_out)?;
            let wrong = group.flagged.binary_search(&sample.row).is_ok();
            dots.push(Dot { tau_in, tau_out, measured, predicted, wrong });
        }
        // A pooled model's surface is drawn for its smallest batch.
        let (_, surface) = predictors.into_iter().next()?;
        let wrong = if dots.iter().any(|dot| dot.wrong) { " (red: plainly wrong, fitted without)" } else { "" };
        let title = format!("{}: {name}, batch {}{wrong}", group.key, surface.batch);
        Some(Self { title, unit: unit.to_owned(), dots, surface, of_energy })
    }

    fn draw(&self, svg: &mut String, top: f64) {
        let _ =
            writeln!(svg, "<text x=\"8\" y=\"{:.0}\" font-weight=\"bold\">{}</text>", top - 14.0, escape(&self.title));
        let drawn: Vec<&Dot> = self.dots.iter().filter(|d| d.predicted > 0.0).collect();
        let both = || drawn.iter().flat_map(|d| [d.measured, d.predicted]);
        let values = LogAxis::over(both());
        let mut panel = Panel { svg, left: LEFT, top };
        let measured = format!("measured, {}", self.unit);
        let predicted = format!("predicted, {}", self.unit);
        panel.log_frame(&values, &values, &predicted, &measured);
        panel.line((0.0, 0.0), (1.0, 1.0));
        for dot in &drawn {
            panel.dot(values.at(dot.predicted), values.at(dot.measured), dot);
        }
        panel.left += LEFT + SIDE + 20.0;
        self.draw_residuals(&mut panel, &values, &drawn, &predicted);
        panel.left += LEFT + SIDE + 20.0;
        self.draw_surface(&mut panel);
    }

    fn draw_residuals(&self, panel: &mut Panel, values: &LogAxis, drawn: &[&Dot], predicted: &str) {
        let residual = |d: &Dot| d.measured / d.predicted - 1.0;
        let trusted = drawn.iter().filter(|d| !d.wrong).map(|d| residual(d).abs());
        let reach = trusted.fold(0.02, f64::max) * 1.1;
        panel.frame(predicted, "measured / predicted - 1");
        panel.log_ticks(values, true);
        for part in [0.0, 0.25, 0.5, 0.75, 1.0] {
            panel.tick(false, part, &format!("{:+.0} %", 100.0 * reach * (2.0 * part - 1.0)));
        }
        panel.line((0.0, 0.5), (1.0, 0.5));
        for dot in drawn {
            // What is plainly wrong lies on the rim.
            let height = (0.5 + 0.5 * residual(dot) / reach).clamp(0.0, 1.0);
            panel.dot(values.at(dot.predicted), height, dot);
        }
    }

    fn draw_surface(&self, panel: &mut Panel) {
        let trusted = || self.dots.iter().filter(|d| !d.wrong);
        let across = LogAxis::over(trusted().map(|d| d.tau_in.max(1.0)));
        let up = LogAxis::over(trusted().map(|d| d.tau_out.max(1.0)));
        let middle = |k: u32| (f64::from(k) + 0.5) / f64::from(SQUARES);
        let value = |i: u32, j: u32| {
            at(&self.surface, self.of_energy, across.value(middle(i)), up.value(middle(j))).unwrap_or(0.0)
        };
        let all = (0..SQUARES).flat_map(|i| (0..SQUARES).map(move |j| (i, j)));
        let colours = LogAxis::over(all.clone().map(|(i, j)| value(i, j)).filter(|v| *v > 0.0));
        let step = SIDE / f64::from(SQUARES);
        for (i, j) in all {
            let part = colours.at(value(i, j).max(f64::MIN_POSITIVE)).clamp(0.0, 1.0);
            let (x, y) = (panel.left + f64::from(i) * step, panel.top + SIDE - f64::from(j + 1) * step);
            let _ = writeln!(
                panel.svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{0:.1}\" height=\"{0:.1}\" fill=\"{1}\"/>",
                step + 0.2,
                heat(part)
            );
        }
        panel.log_frame(&across, &up, "input tokens", "output tokens");
        let right = panel.left + SIDE + 12.0;
        for k in 0..=4 {
            let part = f64::from(k) / 4.0;
            let y = panel.top + SIDE * (1.0 - part);
            let (y_box, y_text) = (y - 5.0, y + 4.0);
            let _ = writeln!(
                panel.svg,
                "<rect x=\"{right:.1}\" y=\"{y_box:.1}\" width=\"10\" height=\"10\" fill=\"{}\"/>",
                heat(part)
            );
            let label = format!("{} {}", short(colours.value(part)), self.unit);
            let _ = writeln!(panel.svg, "<text x=\"{:.1}\" y=\"{y_text:.1}\">{label}</text>", right + 14.0);
        }
    }
}

fn at(predictor: &Predictor, of_energy: bool, tau_in: f64, tau_out: f64) -> Option<f64> {
    let predicted = if of_energy { predictor.energy(tau_in, tau_out) } else { predictor.runtime(tau_in, tau_out) };
    predicted.map(|p| p.value)
}

/// From blue over green to yellow: told apart by brightness too.
fn heat(part: f64) -> String {
    hex(240.0 - 185.0 * part, 0.65, 0.28 + 0.37 * part)
}

/// A colour of hue (degrees), saturation and lightness, written out: not every viewer of SVG knows the functions of CSS.
pub(crate) fn hex(hue: f64, saturation: f64, lightness: f64) -> String {
    let chroma = saturation * (1.0 - (2.0 * lightness - 1.0).abs());
    let channel = |shift: f64| {
        let place = (shift + hue / 30.0) % 12.0;
        let value = lightness - 0.5 * chroma * (place - 3.0).min(9.0 - place).clamp(-1.0, 1.0);
        (255.0 * value).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", channel(0.0), channel(8.0), channel(4.0))
}

/// A number in few characters.
fn short(value: f64) -> String {
    if (0.01..10_000.0).contains(&value) {
        let digits = (2.0 - value.log10().floor()).clamp(0.0, 4.0) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    } else {
        format!("{value:.0e}")
    }
}

struct LogAxis {
    low: f64,
    high: f64,
}

impl LogAxis {
    /// Spans positive values, an e-fold at least.
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = if low > high { (1.0, 10.0) } else { (low, high) };
        let (low, high) = (low.ln() - 0.1, high.ln() + 0.1);
        Self { low, high: high.max(low + 1.0) }
    }

    fn at(&self, value: f64) -> f64 {
        (value.ln() - self.low) / (self.high - self.low)
    }

    fn value(&self, part: f64) -> f64 {
        (self.low + part * (self.high - self.low)).exp()
    }

    /// Powers of ten, or of two where there are few of them.
    fn ticks(&self) -> Vec<f64> {
        let powers = |base: f64| {
            let first = (self.low / base.ln()).ceil() as i32;
            let last = (self.high / base.ln()).floor() as i32;
            (first..=last).map(|k| base.powi(k)).collect::<Vec<f64>>()
        };
        let tens = powers(10.0);
        let all = if tens.len() >= 3 { tens } else { powers(2.0) };
        let step = all.len().div_ceil(6).max(1);
        all.into_iter().step_by(step).collect()
    }
}

struct Panel<'a> {
    svg: &'a mut String,
    left: f64,
    top: f64,
}

impl Panel<'_> {
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.left + SIDE * x, self.top + SIDE * (1.0 - y))
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64)) {
        let ((x, y), (to_x, to_y)) = (self.place(from), self.place(to));
        let _ = writeln!(self.svg, "<path class=\"axis\" opacity=\".5\" d=\"M{x:.1} {y:.1}L{to_x:.1} {to_y:.1}\"/>");
    }

    fn dot(&mut self, x: f64, y: f64, dot: &Dot) {
        let (cx, cy) = self.place((x, y));
        let class = if dot.wrong { "dot wrong" } else { "dot" };
        let _ = writeln!(
            self.svg,
            "<circle class=\"{class}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"2.5\"><title>{} in, {} out: measured {}, predicted \
             {}</title></circle>",
            dot.tau_in,
            dot.tau_out,
            short(dot.measured),
            short(dot.predicted)
        );
    }

    fn frame(&mut self, across: &str, up: &str) {
        let (left, bottom) = (self.left, self.top + SIDE);
        let _ = writeln!(self.svg, "<path class=\"axis\" d=\"M{left} {}V{bottom}H{}\"/>", self.top, left + SIDE);
        let (middle, below) = (left + SIDE / 2.0, bottom + 34.0);
        let _ = writeln!(self.svg, "<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{across}</text>");
        let (x, y) = (left - 48.0, self.top + SIDE / 2.0);
        let _ =
            writeln!(self.svg, "<text transform=\"translate({x} {y}) rotate(-90)\" text-anchor=\"middle\">{up}</text>");
    }

    fn log_frame(&mut self, across: &LogAxis, up: &LogAxis, across_title: &str, up_title: &str) {
        self.frame(across_title, up_title);
        self.log_ticks(across, true);
        self.log_ticks(up, false);
    }

    fn log_ticks(&mut self, axis: &LogAxis, across: bool) {
        for value in axis.ticks() {
            self.tick(across, axis.at(value), &short(value));
        }
    }

    fn tick(&mut self, across: bool, part: f64, label: &str) {
        let end = if across { (part, 1.0) } else { (1.0, part) };
        let start = if across { (part, 0.0) } else { (0.0, part) };
        let ((x, y), (to_x, to_y)) = (self.place(start), self.place(end));
        let _ = writeln!(self.svg, "<path class=\"grid\" d=\"M{x:.1} {y:.1}L{to_x:.1} {to_y:.1}\"/>");
        let (dx, dy, anchor) = if across { (0.0, 16.0, "middle") } else { (-5.0, 4.0, "end") };
        let _ =
            writeln!(self.svg, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{label}</text>", x + dx, y + dy);
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_planner::fit::{Options, fit_groups};
    use joulecast_planner::samples;

    #[test]
    fn every_sample_is_a_dot_and_names_are_escaped() {
        let mut text = "model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s\n".to_owned();
        for i in 0..30 {
            let (x, y) = (8 + 13 * i, 4 + 7 * (i % 6));
            text += &format!("<a&b>,e,p,d,1,{x},{y},{},\n", 3 + x + 4 * y);
        }
        let samples = samples::read(text.as_bytes()).unwrap();
        let groups = fit_groups(samples.clone(), &Options::default());
        let svg = fit(&groups, &samples);
        assert_eq!(svg.matches("<circle").count(), 60);
        // The ground, the squares, and the five of the legend.
        assert_eq!(svg.matches("<rect").count(), 1 + (SQUARES * SQUARES) as usize + 5);
        assert!(svg.contains("&lt;a&amp;b&gt;") && !svg.contains("<a&b>"));
        assert!(svg.contains("prefers-color-scheme") && !svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.012_345, 1.0, 256.0, 9999.0, 123_456.0, 1e-5].map(short);
        assert_eq!(shown, ["0.0123", "1", "256", "9999", "1e5", "1e-5"]);
    }
}
