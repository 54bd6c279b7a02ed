//! Writing: the annotated listing, one comment line a key.

use super::Settings;
use super::keys::{Keys, Mode};

#[derive(Default)]
pub(super) struct Writer {
    sections: Vec<Section>,
}

struct Section {
    path: String,
    doc: String,
    /// (key, TOML text of the value or none where it is unset, meaning)
    lines: Vec<(String, Option<String>, String)>,
}

impl Writer {
    pub fn of<T: Settings + ?Sized>(settings: &mut T) -> Self {
        let mut writer = Writer::default();
        writer.section("", "");
        settings.visit(&mut Keys { mode: Mode::Write(&mut writer), path: String::new() });
        writer
    }

    pub fn section(&mut self, path: &str, doc: &str) {
        self.sections.push(Section { path: path.into(), doc: doc.into(), lines: Vec::new() });
    }

    pub fn line(&mut self, section: &str, name: &str, shown: Option<String>, doc: &str) {
        let section = self
            .sections
            .iter_mut()
            .find(|s| s.path == section)
            .expect("a section is opened before its keys");
        section.lines.push((name.into(), shown, doc.into()));
    }

    pub fn text(&self) -> String {
        self.sections.iter().map(Section::text).collect::<Vec<_>>().join("\n")
    }
}

impl Section {
    fn text(&self) -> String {
        let mut text = String::new();
        if !self.path.is_empty() {
            text += &format!("# {}\n[{}]\n", self.doc, self.path);
        }
        for (name, shown, doc) in &self.lines {
            let line = shown
                .as_ref()
                .map_or_else(|| format!("# {name} ="), |value| format!("{name} = {value}"));
            text += &format!("# {doc}\n{line}\n");
        }
        text
    }
}

/// Every key and table of the document as dotted paths.
pub(super) fn paths<T: Settings + ?Sized>(settings: &mut T) -> Vec<String> {
    let join = |section: &Section, name: &str| {
        if section.path.is_empty() { name.into() } else { format!("{}.{name}", section.path) }
    };
    let keys_of = |section: &Section| {
        section.lines.iter().map(|(name, _, _)| join(section, name)).collect::<Vec<_>>()
    };
    Writer::of(settings).sections.iter().flat_map(keys_of).collect()
}

/// A TOML basic string.
pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}
