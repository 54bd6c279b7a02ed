//! Writing: the annotated listing, one comment line a key.

use std::collections::BTreeSet;

use super::keys::{Field, Key, Keys, Members, Settings, Tables};
use super::words::joined;

/// The tables of a listing.
pub(super) struct Listing {
    sections: Vec<Section>,
}

struct Section {
    path: String,
    /// The line that opens it: `[path]`; none for the document itself.
    header: Option<Line>,
    keys: Vec<(String, Line)>,
}

/// A line of TOML under its comment.
struct Line {
    comment: String,
    text: String,
    /// True where the line only shows what could stand there.
    is_example: bool,
}

impl Listing {
    pub fn of(settings: &mut dyn Settings) -> Self {
        let mut listing =
            Listing { sections: vec![Section { path: String::new(), header: None, keys: vec![] }] };
        let path = String::new();
        settings.visit(&mut SectionWriter { listing: &mut listing, path, is_example: false });
        listing
    }

    pub fn text(&self) -> String {
        self.sections.iter().map(Section::text).collect::<Vec<_>>().join("\n")
    }

    /// Every key as a dotted path; keys of an array's tables once.
    pub fn paths(&self) -> Vec<String> {
        let paths = |section: &Section| {
            section.keys.iter().map(|(name, _)| joined(&section.path, name)).collect::<Vec<_>>()
        };
        let mut seen = BTreeSet::new();
        let all = self.sections.iter().flat_map(paths);
        all.filter(|path| seen.insert(path.clone())).collect()
    }
}

impl Section {
    fn text(&self) -> String {
        self.header.iter().chain(self.keys.iter().map(|(_, line)| line)).map(Line::text).collect()
    }
}

impl Line {
    fn text(&self) -> String {
        let mark = if self.is_example { "# " } else { "" };
        format!("# {}\n{mark}{}\n", self.comment, self.text)
    }
}

/// Writes one table.
struct SectionWriter<'l> {
    listing: &'l mut Listing,
    path: String,
    is_example: bool,
}

impl SectionWriter<'_> {
    /// Opens a section and writes the settings into it.
    fn section(&mut self, path: String, header: Line, settings: &mut dyn Settings) {
        let is_example = header.is_example;
        let section = Section { path: path.clone(), header: Some(header), keys: Vec::new() };
        self.listing.sections.push(section);
        settings.visit(&mut SectionWriter { listing: self.listing, path, is_example });
    }

    fn line(&self, comment: &str, text: String) -> Line {
        Line { comment: comment.into(), text, is_example: self.is_example }
    }
}

/// "The update rule. One of: adamw."
fn with_words(meaning: &str, words: &[&str]) -> String {
    if words.is_empty() {
        meaning.into()
    } else {
        format!("{meaning} One of: {}.", words.join(", "))
    }
}

impl Keys for SectionWriter<'_> {
    fn value(&mut self, key: Key<'_>, field: &mut dyn Field) {
        let shown = field.shown();
        let is_example = self.is_example || shown.is_none();
        let text = match shown {
            Some(value) => format!("{} = {value}", key.name),
            None => format!("{} =", key.name),
        };
        let comment = with_words(key.meaning, &field.words());
        let section = self.listing.sections.iter_mut().rfind(|section| section.path == self.path);
        let section = section.expect("a section is opened before its keys");
        section.keys.push((key.name.into(), Line { comment, text, is_example }));
    }

    fn table(&mut self, key: Key<'_>, settings: &mut dyn Settings) {
        let path = joined(&self.path, key.name);
        let header = self.line(key.meaning, format!("[{path}]"));
        self.section(path, header, settings);
    }

    fn tables(&mut self, key: Key<'_>, tables: &mut dyn Tables) {
        let path = joined(&self.path, key.name);
        let header = || self.line(key.meaning, format!("[[{path}]]"));
        let headers: Vec<Line> = tables.all().iter().map(|_| header()).collect();
        if headers.is_empty() {
            let header = Line { is_example: true, ..header() };
            return self.section(path, header, tables.example().as_mut());
        }
        for (settings, header) in tables.all().into_iter().zip(headers) {
            self.section(path.clone(), header, settings);
        }
    }

    fn family(&mut self, key: Key<'_>, family: &mut dyn Members) {
        let path = joined(&self.path, key.name);
        SectionWriter { listing: self.listing, path, is_example: self.is_example }
            .member(key, family);
    }

    fn member(&mut self, key: Key<'_>, family: &mut dyn Members) {
        let path = joined(&self.path, family.chosen());
        let comment = with_words(key.meaning, family.names());
        let header = self.line(&comment, format!("[{path}]"));
        self.section(path, header, family.settings());
    }
}
