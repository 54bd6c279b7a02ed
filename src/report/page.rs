//! `report.html`: a finished run on one self-contained page.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::error::Result;
use crate::files::durable::replace_file;
use crate::report::history::{HistoryRow, table};
use crate::report::{Bars, Chart};

/// The contents of the page, in its order.
#[derive(Clone, Debug, Default)]
pub struct ReportData {
    pub title: String,
    /// One sentence under the title.
    pub summary: String,
    /// Short names and values: steps, parameters, ranks, time.
    pub facts: Vec<(String, String)>,
    /// Charts; the first one, usually the loss, has the full width.
    pub figures: Vec<Figure>,
    /// Caption of the samples, and their PNG bytes from [`grid_png`](crate::report::grid_png).
    pub samples: Option<(String, Vec<u8>)>,
    /// Samples of prompts over the run.
    pub history: Vec<HistoryRow>,
    /// The resolved configuration as text.
    pub configuration: String,
}

#[derive(Clone, Debug)]
pub enum Figure {
    Chart(Chart),
    Bars(Bars),
}

impl Figure {
    fn svg(&self, width: u32, height: u32) -> String {
        match self {
            Figure::Chart(chart) => chart.svg(width, height),
            Figure::Bars(bars) => bars.svg(width, height),
        }
    }
}

/// Writes the page; it needs no script, no font and no other file.
///
/// # Errors
/// [`Error::Storage`](crate::error::Error::Storage) if the file cannot be written.
pub fn write_report(path: &Path, data: &ReportData) -> Result<()> {
    let page = page(data);
    replace_file(path, |out| out.write_all(page.as_bytes()))
}

fn page(data: &ReportData) -> String {
    let title = escaped(&data.title);
    let parts = [
        facts(&data.facts),
        figures(&data.figures),
        samples(data.samples.as_ref()),
        section("Samples over the run", &table(&data.history), !data.history.is_empty()),
        configuration(&data.configuration),
    ];
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<p>{}</p>\n{}</main>\n</body>\n</html>\n",
        escaped(&data.summary),
        parts.concat()
    )
}

fn facts(facts: &[(String, String)]) -> String {
    let cell = |(name, value): &(String, String)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escaped(name), escaped(value))
    };
    section(
        "",
        &format!("<dl>\n{}</dl>\n", facts.iter().map(cell).collect::<String>()),
        !facts.is_empty(),
    )
}

fn figures(figures: &[Figure]) -> String {
    let (first, others) = figures.split_at(figures.len().min(1));
    let wide: String = first
        .iter()
        .map(|figure| format!("<figure class=\"wide\">{}</figure>\n", figure.svg(960, 380)))
        .collect();
    let small: String = others
        .iter()
        .map(|figure| format!("<figure>{}</figure>\n", figure.svg(472, 300)))
        .collect();
    section("", &format!("<div class=\"figures\">\n{wide}{small}</div>\n"), !figures.is_empty())
}

fn samples(samples: Option<&(String, Vec<u8>)>) -> String {
    let image = |(caption, png): &(String, Vec<u8>)| {
        let caption = escaped(caption);
        format!(
            "<figure class=\"samples\"><img alt=\"{caption}\" src=\"data:image/png;base64,{}\"></figure>\n<p>{caption}</p>\n",
            STANDARD.encode(png)
        )
    };
    section("Samples", &samples.map(image).unwrap_or_default(), samples.is_some())
}

fn configuration(text: &str) -> String {
    let body = format!(
        "<details>\n<summary>Resolved configuration</summary>\n<pre>{}</pre>\n</details>\n",
        escaped(text)
    );
    section("", &body, !text.is_empty())
}

fn section(heading: &str, body: &str, shown: bool) -> String {
    let heading = if heading.is_empty() { String::new() } else { format!("<h2>{heading}</h2>\n") };
    if shown { format!("<section>\n{heading}{body}</section>\n") } else { String::new() }
}

/// Escapes text for HTML, also within a quoted attribute.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            '\'' => safe += "&#39;",
            other => safe.push(other),
        }
    }
    safe
}

const STYLE: &str = "
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: #111827; font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }
main { max-width: 1024px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 40px 0 12px; font-size: 20px; letter-spacing: -0.01em; }
p { margin: 8px 0 0; color: #4b5563; }
dl { margin: 28px 0 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1px; background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; overflow: hidden; }
dl div { box-shadow: 0 0 0 1px #e5e7eb; padding: 10px 14px; }
dt { font-size: 12.5px; color: #6b7280; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures { margin-top: 16px; display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; overflow: hidden; }
figure.wide { grid-column: 1 / -1; }
figure.samples { padding: 8px; text-align: center; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; font-variant-numeric: tabular-nums; }
img { width: 760px; max-width: 100%; }
.history { overflow-x: auto; }
.history table { border-collapse: collapse; }
.history th { padding: 4px 10px 4px 0; max-width: 200px; text-align: left; font-size: 13px; font-weight: 500; color: #6b7280; }
.history td { padding: 0 4px 4px 0; }
.history img { display: block; width: auto; height: 112px; max-width: none; image-rendering: pixelated; }
details { margin-top: 40px; background: #fff; border: 1px solid #e5e7eb; border-radius: 8px; }
summary { padding: 12px 16px; font-weight: 600; cursor: pointer; }
pre { margin: 0; padding: 4px 16px 16px; overflow-x: auto; font: 13px/1.55 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; color: #374151; }
@media (max-width: 720px) { .figures { grid-template-columns: 1fr; } }
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Series;

    #[test]
    fn the_page_needs_nothing_from_outside() {
        let chart = Chart {
            title: "Loss".into(),
            series: vec![Series { name: "train".into(), points: vec![(1.0, 2.0)] }],
            ..Chart::default()
        };
        let figures =
            vec![Figure::Chart(chart), Figure::Bars(Bars { range: (0.0, 1.0), ..Bars::default() })];
        let data = ReportData {
            title: "Run".into(),
            figures,
            samples: Some(("digits".into(), vec![1, 2, 3])),
            ..ReportData::default()
        };
        let page = page(&data);
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(page.contains("data:image/png;base64,AQID"));
        let foreign = page.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !["http", "//", "<script", "<link", "@import", "url("]
                .iter()
                .any(|sign| foreign.contains(sign))
        );
    }

    #[test]
    fn no_text_can_become_markup() {
        let evil = "</pre><script>\"'&";
        let data = ReportData {
            title: evil.into(),
            summary: evil.into(),
            facts: vec![(evil.into(), evil.into())],
            figures: vec![Figure::Chart(Chart { title: evil.into(), ..Chart::default() })],
            samples: Some((evil.into(), Vec::new())),
            history: Vec::new(),
            configuration: evil.into(),
        };
        let page = page(&data);
        assert!(!page.contains("<script"));
        assert_eq!(
            page.matches("&lt;script&gt;").count(),
            9,
            "title twice, summary, fact twice, chart, alt, caption, configuration"
        );
    }

    #[test]
    fn what_there_is_not_leaves_no_empty_section() {
        let page = page(&ReportData { title: "Run".into(), ..ReportData::default() });
        assert!(!page.contains("<section>") && !page.contains("<h2>"));
    }
}
