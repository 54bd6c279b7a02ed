//! Formats one event as a line: plain text for the console, JSON for the file.

use std::fmt::Debug;

use serde_json::{Map, Number, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::error::one_line;

/// Longest `write` to a pipe that the system does not interleave with another process's.
const LINE_BYTES: usize = 4096;

pub(super) struct Record {
    /// Time as RFC 3339, UTC, in microseconds.
    time: String,
    pub level: Level,
    message: String,
    /// Fields in the event's order.
    fields: Vec<(&'static str, Value)>,
}

impl Record {
    pub fn new(level: Level, message: String) -> Self {
        let mut time = String::new();
        // Writing to a String cannot fail, and a clock before 1970 only leaves the time out.
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        Record { time, level, message, fields: Vec::new() }
    }

    pub fn from_event(event: &Event<'_>) -> Self {
        let mut record = Record::new(*event.metadata().level(), String::new());
        event.record(&mut record);
        record
    }

    pub fn json(&self) -> String {
        let fields: Map<String, Value> =
            self.fields.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        json!({ "time": self.time, "level": self.level.as_str(), "message": self.message, "fields": fields }).to_string()
    }

    /// Returns `14:02:11 WARN [rank 3] message key=value`, at most 4 KiB with its newline; the time
    /// is UTC.
    pub fn text(&self, prefix: &str, colour: bool) -> String {
        let mut text = self.time.get(11..19).unwrap_or_default().to_owned();
        if self.level != Level::INFO {
            text += &match (colour, self.level) {
                (true, Level::ERROR) => " \x1b[31mERROR\x1b[0m".to_owned(),
                (true, Level::WARN) => " \x1b[33mWARN\x1b[0m".to_owned(),
                (_, level) => format!(" {level}"),
            };
        }
        for part in [prefix, &one_line(&self.message)] {
            if !part.is_empty() {
                text.push(' ');
                text += part;
            }
        }
        for (name, value) in &self.fields {
            text += &format!(" {name}={}", value_text(value));
        }
        shortened(text)
    }

    fn push(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(message)) => self.message = message,
            (name, value) => self.fields.push((name, value)),
        }
    }
}

impl Visit for Record {
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN, and a log must not lose it, so it is written as text.
        self.push(
            field,
            Number::from_f64(value).map_or_else(|| value.to_string().into(), Value::Number),
        );
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.push(field, format!("{value:?}").into());
    }
}

/// Formats floats with six significant digits, and texts without quotes if that is unambiguous.
fn value_text(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            let rounded = format!("{:.5e}", number.as_f64().unwrap_or(f64::NAN)).parse::<f64>();
            format!("{:?}", rounded.unwrap_or(f64::NAN))
        }
        Value::String(text) if !text.is_empty() && !text.contains(char::is_whitespace) => {
            one_line(text)
        }
        Value::String(text) => format!("\"{}\"", one_line(text)),
        other => other.to_string(),
    }
}

fn shortened(mut text: String) -> String {
    const MARK: &str = " …";
    if text.len() >= LINE_BYTES {
        let end =
            (0..LINE_BYTES - MARK.len()).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
        text += MARK;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(level: Level, message: &str, fields: &[(&'static str, Value)]) -> Record {
        Record {
            time: "2026-05-12T14:02:11.123456Z".into(),
            level,
            message: message.into(),
            fields: fields.to_vec(),
        }
    }

    #[test]
    fn the_level_is_shown_only_when_it_says_something() {
        assert_eq!(record(Level::INFO, "saved", &[]).text("", false), "14:02:11 saved");
        assert_eq!(
            record(Level::WARN, "slow", &[]).text("[rank 3]", false),
            "14:02:11 WARN [rank 3] slow"
        );
        assert_eq!(
            record(Level::WARN, "slow", &[]).text("", true),
            "14:02:11 \x1b[33mWARN\x1b[0m slow"
        );
    }

    #[test]
    fn fields_keep_their_order_and_a_readable_precision() {
        let fields = [
            ("loss", json!(f64::from(0.4f32))),
            ("lr", json!(1e-5)),
            ("count", json!(3)),
            ("path", json!("a b")),
        ];
        assert_eq!(
            record(Level::INFO, "step", &fields).text("", false),
            "14:02:11 step loss=0.4 lr=1e-5 count=3 path=\"a b\""
        );
    }

    #[test]
    fn a_hostile_file_name_cannot_start_a_line_of_its_own() {
        let record =
            record(Level::INFO, "read \n14:00:00 fake", &[("file", json!("\u{1b}[2Jx\r"))]);
        assert!(!record.text("", false).contains(char::is_control));
        assert_eq!(record.json().lines().count(), 1);
    }

    #[test]
    fn a_long_line_is_cut_at_four_kibibytes_between_characters() {
        let text = record(Level::INFO, &"ä".repeat(5000), &[]).text("", false);
        assert!(
            text.len() < LINE_BYTES && text.len() > LINE_BYTES - 8 && text.ends_with('…'),
            "{}",
            text.len()
        );
    }
}
