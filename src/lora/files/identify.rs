//! The family of a LoRA: by names, then by metadata, then by the sizes of published models.

use std::collections::BTreeMap;

use super::facts;
use crate::lora::family::Family;
use crate::lora::{Pair, listed};
use crate::settings::{Choice, nearest};

/// A LoRA under the names of each family that has all of them.
pub type Readings = Vec<(Family, BTreeMap<String, Pair>)>;

/// Returns the families that have all names; only `family` is asked if it is given.
///
/// # Errors
/// A reason on one line: unknown names with the nearest known ones.
pub fn candidates(modules: &[&str], family: Option<Family>) -> Result<Vec<Family>, String> {
    let families: Vec<Family> = match family {
        Some(family) => vec![family],
        None => Family::ALL.iter().map(|(_, family)| *family).collect(),
    };
    let strange = |family: &Family| -> Vec<&str> {
        modules.iter().copied().filter(|module| family.matches(module).is_empty()).collect()
    };
    let fitting: Vec<Family> =
        families.iter().copied().filter(|family| strange(family).is_empty()).collect();
    if !fitting.is_empty() {
        return Ok(fitting);
    }
    let nearest = families.iter().min_by_key(|family| strange(family).len());
    let nearest = nearest.expect("there are families");
    if family.is_none() && strange(nearest).len() == modules.len() {
        let titles: Vec<&str> = families.iter().map(|family| family.title).collect();
        return Err(format!(
            "adapts `{}`, a name of no family that is known here: {}",
            modules[0],
            titles.join(", ")
        ));
    }
    let told = strange(nearest).into_iter().map(|module| unknown(module, *nearest));
    Err(format!("is not of {}: {}", nearest.title, listed(told)))
}

fn unknown(module: &str, family: Family) -> String {
    let is_digit = |c: char| c.is_ascii_digit();
    let number: String =
        module.chars().skip_while(|c| !is_digit(*c)).take_while(|c| is_digit(*c)).collect();
    let known = family.spelled(if number.is_empty() { "0" } else { &number });
    let flat: Vec<String> = known.iter().map(|name| name.replace('.', "_")).collect();
    let spelled = if module.contains('.') { &known } else { &flat };
    match nearest(module, spelled.iter().map(String::as_str)) {
        Some(near) => format!("unknown `{module}`, the nearest is `{near}`"),
        None => format!("unknown `{module}`"),
    }
}

/// Returns the one reading that the metadata or the published sizes tell.
///
/// # Errors
/// A reason on one line with the families that are left.
pub fn told_apart(
    readings: Readings,
    metadata: &BTreeMap<String, String>,
) -> Result<(Family, BTreeMap<String, Pair>), String> {
    let named = facts::family(metadata);
    let mut left = readings;
    keep_if_any(&mut left, |family, _| Some(family) == named);
    keep_if_any(&mut left, has_size(|found, published| found <= published));
    keep_if_any(&mut left, has_size(is_usual));
    if left.len() == 1
        && let Some(reading) = left.pop()
    {
        return Ok(reading);
    }
    let title = |(family, _): &(Family, _)| format!("{} ({})", family.title, family.word());
    let titles: Vec<String> = left.iter().map(title).collect();
    let titles = titles.join(" and ");
    Err(format!("has names that {titles} have; say which it is by --family"))
}

/// Drops the readings that the test refuses, unless it refuses all.
fn keep_if_any(readings: &mut Readings, test: impl Fn(Family, &BTreeMap<String, Pair>) -> bool) {
    if readings.iter().any(|(family, pairs)| test(*family, pairs)) {
        readings.retain(|(family, pairs)| test(*family, pairs));
    }
}

/// Most LoRAs are in all blocks of a kind or in none.
fn is_usual(found: u32, published: u32) -> bool {
    found == published || found == 0
}

/// True if a published model of the family has blocks as the LoRA does, of that width.
fn has_size(compare: fn(u32, u32) -> bool) -> impl Fn(Family, &BTreeMap<String, Pair>) -> bool {
    move |family, pairs| {
        let is_query = |name: &str| name.ends_with(".to_q") || name.ends_with(".add_q_proj");
        let mut queries = pairs.iter().filter(|(name, _)| is_query(name));
        let width = queries.next().map(|(_, pair)| pair.inputs());
        let double = blocks(pairs, "transformer_blocks");
        let single = blocks(pairs, "single_transformer_blocks");
        family.published.iter().any(|model| {
            width.is_none_or(|width| width == model.width)
                && compare(double, model.double)
                && compare(single, model.single)
        })
    }
}

/// Returns the highest number of a block behind `prefix`, plus one.
fn blocks(pairs: &BTreeMap<String, Pair>, prefix: &str) -> u32 {
    let number = |name: &String| {
        let rest = name.strip_prefix(prefix)?.strip_prefix('.')?;
        rest.split('.').next()?.parse::<u32>().ok()
    };
    pairs.keys().filter_map(number).max().map_or(0, |number| number.saturating_add(1))
}
