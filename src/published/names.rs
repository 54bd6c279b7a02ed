//! The names under which files hold a class's tensors.

/// Names of a class's tensors, which begin differently in files of different ages.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Prefixes that may stand before every name; the last one holds if none is found.
    pub prefixes: &'static [&'static str],
    /// A tensor that every folder has, behind the prefix.
    pub first: &'static str,
    /// Other names of tensors: as the class has them, and as a file may have them instead.
    pub others: &'static [(&'static str, &'static str)],
    /// Parts of the names of tensors that a folder may hold and that nothing reads.
    pub unused: &'static [&'static str],
}

impl Names {
    /// Names as the class has them.
    pub const fn plain(unused: &'static [&'static str]) -> Self {
        Names { prefixes: &[""], first: "", others: &[], unused }
    }

    /// The prefix of a file that `holds` tensors.
    pub(super) fn prefix(&self, holds: impl Fn(&str) -> bool) -> &'static str {
        let found = self.prefixes.iter().find(|prefix| holds(&format!("{prefix}{}", self.first)));
        found.or(self.prefixes.last()).copied().unwrap_or_default()
    }

    /// The other name of a tensor, if it has one.
    pub(super) fn other(&self, name: &str) -> Option<&'static str> {
        self.others.iter().find(|(own, _)| *own == name).map(|(_, other)| *other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: Names = Names {
        prefixes: &["model.text.", "text.", ""],
        first: "embed.weight",
        others: &[("shared.weight", "embed.weight")],
        unused: &[],
    };

    #[test]
    fn a_prefix_is_found_by_a_tensor_that_every_folder_has() {
        let prefix = |held: &str| NAMES.prefix(|name| name == held);
        assert_eq!(prefix("text.embed.weight"), "text.");
        assert_eq!(prefix("model.text.embed.weight"), "model.text.");
        assert_eq!(prefix("embed.weight"), "");
        assert_eq!(prefix("something.else"), "");
    }

    #[test]
    fn a_tensor_may_have_another_name() {
        assert_eq!(NAMES.other("shared.weight"), Some("embed.weight"));
        assert_eq!(NAMES.other("embed.weight"), None);
    }
}
