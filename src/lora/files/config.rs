//! peft's `LoraConfig`, as diffusers' metadata and `adapter_config.json` hold it.
//!
//! Source: PEFT, `tuners/lora/config.py` and `utils/other.py` (`get_pattern_key`).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Alpha;
use crate::lora::family::Family;
use crate::lora::{Lora, Pair};

/// Most entries of a pattern: each is compared with each module.
const MAX_PATTERNS: usize = 4096;

/// The scales that such a configuration tells.
#[derive(Debug)]
pub struct LoraConfig {
    rank: i64,
    alpha: f64,
    /// By module, or by the end of its name; the first that matches counts.
    ranks: Vec<(String, f64)>,
    alphas: Vec<(String, f64)>,
    /// The scale is alpha / √r.
    is_stabilized: bool,
    pub has_magnitudes: bool,
    pub targets: Vec<String>,
    pub base_model: Option<String>,
}

impl LoraConfig {
    /// Reads a configuration whose fields begin with `prefix`, or with nothing.
    ///
    /// # Errors
    /// The field that has no sound value.
    pub fn parse(fields: &Map<String, Value>, prefix: &str) -> Result<Self, String> {
        let prefix = if fields.keys().any(|key| key.starts_with(prefix)) { prefix } else { "" };
        let field =
            |name: &str| fields.get(&format!("{prefix}{name}")).filter(|value| !value.is_null());
        let number = |name: &str| match field(name).map(Value::as_f64) {
            Some(Some(number)) if number.is_finite() => Ok(number),
            Some(_) => Err(format!("`{name}` is no number")),
            None => Err(format!("names no `{name}`")),
        };
        let is_set = |name: &str| field(name).and_then(Value::as_bool).unwrap_or(false);
        if let Some(method) = field("peft_type").and_then(Value::as_str)
            && method != "LORA"
        {
            return Err(format!("`peft_type` is `{method}`, expected `LORA`"));
        }
        let targets = match field("target_modules") {
            Some(Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).map(String::from).collect()
            }
            Some(Value::String(pattern)) => vec![pattern.clone()],
            _ => Vec::new(),
        };
        Ok(LoraConfig {
            rank: number("r")? as i64,
            alpha: number("lora_alpha")?,
            ranks: pattern(field("rank_pattern"), "rank_pattern")?,
            alphas: pattern(field("alpha_pattern"), "alpha_pattern")?,
            is_stabilized: is_set("use_rslora"),
            has_magnitudes: is_set("use_dora"),
            targets,
            base_model: field("base_model_name_or_path").and_then(Value::as_str).map(String::from),
        })
    }

    pub fn rank_of(&self, module: &str) -> i64 {
        found(&self.ranks, module).map_or(self.rank, |rank| rank as i64)
    }

    /// Returns the alpha of a scale of alpha / r.
    pub fn alpha_of(&self, module: &str) -> f64 {
        let alpha = found(&self.alphas, module).unwrap_or(self.alpha);
        let rank = self.rank_of(module) as f64;
        if self.is_stabilized { alpha * rank.sqrt() } else { alpha }
    }
}

/// The number of the first key that matches.
fn found(pattern: &[(String, f64)], module: &str) -> Option<f64> {
    let matches = |key: &str| match key.strip_prefix('^') {
        Some(whole) => module == whole,
        None => module.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    };
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, number)| *number)
}

/// Reads numbers by module. peft takes regular expressions; names and their ends are understood.
fn pattern(field: Option<&Value>, name: &str) -> Result<Vec<(String, f64)>, String> {
    let Some(field) = field else { return Ok(Vec::new()) };
    let entries = field.as_object().ok_or_else(|| format!("`{name}` is no object"))?;
    if entries.len() > MAX_PATTERNS {
        return Err(format!("`{name}` has more than {MAX_PATTERNS} entries"));
    }
    let entry = |(key, value): (&String, &Value)| {
        let literal = key.strip_prefix('^').unwrap_or(key);
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !literal.bytes().all(is_name) {
            return Err(format!(
                "`{name}` has the expression `{key}`; give modules by their names"
            ));
        }
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok((key.clone(), number)),
            _ => Err(format!("`{name}` has no number for `{key}`")),
        }
    };
    entries.iter().map(entry).collect()
}

/// Returns the fields that describe the LoRA as it is written.
pub fn describe(lora: &Lora, family: Family, alpha: Alpha) -> BTreeMap<&'static str, Value> {
    let is_folded = alpha.is_folded();
    let alpha_of = |pair: &Pair| if is_folded { pair.rank() as f64 } else { pair.alpha };
    let (rank, usual) = lora.usual();
    let usual = if is_folded { rank as f64 } else { usual };
    let pattern = |number: &dyn Fn(&Pair) -> f64, usual: f64| {
        let others = lora.pairs.iter().filter(|(_, pair)| number(pair) != usual);
        let entries = others.map(|(name, pair)| (format!("^{name}"), written(number(pair))));
        Value::Object(entries.collect())
    };
    let has_magnitudes = lora.pairs.values().any(|pair| pair.magnitude.is_some());
    BTreeMap::from([
        ("alpha_pattern", pattern(&alpha_of, usual)),
        ("bias", json!("none")),
        ("lora_alpha", written(usual)),
        ("r", json!(rank)),
        ("rank_pattern", pattern(&|pair| pair.rank() as f64, rank as f64)),
        ("target_modules", targets(lora, family)),
        ("use_dora", json!(has_magnitudes)),
        ("use_rslora", json!(false)),
    ])
}

/// The modules by name. peft also takes modules that end in a name; where others of the family do,
/// an expression keeps them out.
fn targets(lora: &Lora, family: Family) -> Value {
    let reaches = |name: &str| {
        let end = format!(".{name}");
        family.linears.iter().any(|linear| linear.diffusers.ends_with(&end))
    };
    let names = || lora.pairs.keys();
    if names().any(|name| reaches(name)) {
        let escaped: Vec<String> = names().map(|name| name.replace('.', "\\.")).collect();
        return json!(format!("({})", escaped.join("|")));
    }
    names().map(|name| json!(name)).collect()
}

/// As an integer where it is one: some versions of peft check the type.
fn written(number: f64) -> Value {
    let whole = number as i64;
    if whole as f64 == number { json!(whole) } else { json!(number) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Facts;
    use crate::lora::tests::pair;

    fn lora(of: &[(&str, i64, f64)]) -> Lora {
        let pairs =
            of.iter().map(|&(name, rank, alpha)| (name.to_string(), pair(0, [4, 4], rank, alpha)));
        Lora { pairs: pairs.collect(), facts: Facts::default() }
    }

    fn parse(fields: Value) -> Result<LoraConfig, String> {
        LoraConfig::parse(fields.as_object().expect("an object"), "transformer.")
    }

    #[test]
    fn ranks_and_alphas_of_single_modules_come_back() {
        let modules = [
            ("transformer_blocks.0.attn.to_q", 4, 4.0),
            ("transformer_blocks.0.attn.to_k", 4, 4.0),
            ("transformer_blocks.1.attn.to_k", 2, 8.0),
        ];
        let lora = lora(&modules);
        for alpha in [Alpha::Config, Alpha::Folded] {
            let fields = describe(&lora, Family::Flux, alpha);
            let fields =
                fields.into_iter().map(|(key, value)| (format!("transformer.{key}"), value));
            let config = parse(Value::Object(fields.collect())).expect("our own");
            for (name, rank, full) in modules {
                assert_eq!(config.rank_of(name), rank);
                let expected = if alpha == Alpha::Folded { rank as f64 } else { full };
                assert_eq!(config.alpha_of(name), expected);
            }
        }
    }

    #[test]
    fn the_first_pattern_that_ends_the_name_counts() {
        let config = parse(json!({
            "r": 8, "lora_alpha": 16, "use_rslora": true,
            "rank_pattern": {"^to_q": 1, "attn.to_q": 4, "to_q": 2},
        }))
        .expect("sound");
        assert_eq!(config.rank_of("blocks.0.attn.to_q"), 4);
        assert_eq!(config.rank_of("blocks.0.cross.to_q"), 2);
        assert_eq!(config.rank_of("blocks.0.attn.not_to_q"), 8);
        assert_eq!(config.alpha_of("blocks.0.attn.to_q"), 32.0);
    }

    #[test]
    fn fields_without_sense_are_named() {
        for (fields, told) in [
            (json!({"lora_alpha": 1}), "names no `r`"),
            (json!({"r": 4, "lora_alpha": "x"}), "`lora_alpha` is no number"),
            (json!({"r": 4, "lora_alpha": 4, "peft_type": "LOHA"}), "`peft_type` is `LOHA`"),
            (json!({"r": 4, "lora_alpha": 4, "rank_pattern": {"a|b": 2}}), "the expression `a|b`"),
            (json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {"a": "b"}}), "no number for `a`"),
        ] {
            let error = parse(fields).expect_err(told);
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn a_name_in_which_others_end_is_an_expression() {
        let of = |names: &[&str]| {
            let modules: Vec<(&str, i64, f64)> = names.iter().map(|name| (*name, 2, 2.0)).collect();
            targets(&lora(&modules), Family::Flux)
        };
        assert_eq!(
            of(&["single_transformer_blocks.0.proj_out"]),
            json!(["single_transformer_blocks.0.proj_out"])
        );
        assert_eq!(of(&["proj_out", "x_embedder"]), json!("(proj_out|x_embedder)"));
    }
}
