//! A summary as text for a terminal.

use std::fmt;

use bytesize::ByteSize;

use super::{GroupSummary, Summary, TensorSummary};

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |word: &str, text: &str| writeln!(f, "{word:<12} {text}");
        line("name", &self.name)?;
        line("source", &self.source)?;
        line("licence", &self.licence)?;
        let captions = if self.captions { ", with captions" } else { "" };
        let (samples, files, word) = (self.samples, self.files, self.data_type.word());
        line("samples", &format!("{samples} of type {word} in {files} files{captions}"))?;
        if let Some(bytes) = self.bytes {
            line("size", &ByteSize(bytes).to_string())?;
        }
        if let Some(steps) = self.steps_per_epoch {
            line("epoch", &format!("{steps} steps"))?;
        }
        for group in &self.groups {
            write!(f, "{group}")?;
        }
        self.warnings.iter().try_for_each(|warning| writeln!(f, "{:<12} {warning}", "warning"))
    }
}

impl fmt::Display for GroupSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, samples, size) = (&self.name, self.samples, ByteSize(self.bytes));
        writeln!(f, "{:<12} {name}: {samples} samples, {size}", "group")?;
        let width = self.tensors.keys().map(String::len).max().unwrap_or_default();
        self.tensors.iter().try_for_each(|(key, tensor)| writeln!(f, "  {key:<width$}  {tensor}"))
    }
}

impl fmt::Display for TensorSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axis = |(place, axis): (usize, &i64)| match self.lengths {
            Some((min, max)) if place == 0 => format!("{min}..{max}"),
            _ => axis.to_string(),
        };
        let axes: Vec<String> = self.shape.iter().enumerate().map(axis).collect();
        write!(f, "{} [{}]", self.kind, axes.join(", "))?;
        if let Some((min, max)) = self.valid_tokens {
            write!(f, ", {min}..{max} tokens valid")?;
        }
        if let Some((min, max)) = self.scales {
            write!(f, ", scale {min:.3e}..{max:.3e}")?;
        }
        match self.values {
            None => Ok(()),
            Some(values) => write!(
                f,
                "  {:.4} to {:.4}, mean {:.4}, standard deviation {:.4}",
                values.min, values.max, values.mean, values.deviation
            ),
        }
    }
}
