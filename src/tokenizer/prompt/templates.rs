//! Prompts in the chats of language models.

use super::Tokenizer;

/// The text of a chat, and how many of its tokens are the template's own beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct Templated {
    pub text: String,
    /// First tokens whose hidden states are dropped.
    pub dropped: usize,
}

impl Templated {
    /// Returns the ids of the whole text, at most `most`, the dropped ones included.
    pub fn ids(&self, tokenizer: &Tokenizer, most: usize) -> Vec<i64> {
        tokenizer.ids_of_chat(&self.text, most)
    }
}

const FLUX2_SYSTEM: &str = concat!(
    "You are an AI that reasons about image descriptions. You give structured responses focusing ",
    "on object relationships, object\nattribution and actions without speculation."
);

const QWEN_IMAGE_SYSTEM: &str = concat!(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, ",
    "spatial relationships of the objects and background:"
);
const QWEN_IMAGE_DROPPED: usize = 34;

/// Each number stands behind nine spaces; with fewer the text has not [`HUNYUAN_VIDEO15_DROPPED`]
/// tokens before the prompt.
const HUNYUAN_VIDEO15_SYSTEM: &str = concat!(
    "You are a helpful assistant. Describe the video by detailing the following aspects: ",
    "        1. The main content and theme of the video. ",
    "        2. The color, shape, size, texture, quantity, text, and spatial relationships of ",
    "the objects. ",
    "        3. Actions, events, behaviors temporal relationships, physical movement changes of ",
    "the objects. ",
    "        4. background environment, light, style and atmosphere. ",
    "        5. camera angles, movements, and transitions used in the video."
);
const HUNYUAN_VIDEO15_DROPPED: usize = 108;

/// FLUX.2 dev: a system text and the prompt, without the mark of a picture.
pub fn flux2_dev(prompt: &str) -> Templated {
    let prompt = prompt.replace("[IMG]", "");
    let text = format!("<s>[SYSTEM_PROMPT]{FLUX2_SYSTEM}[/SYSTEM_PROMPT][INST]{prompt}[/INST]");
    Templated { text, dropped: 0 }
}

/// FLUX.2 klein: the prompt, and an answer that begins with no thoughts.
pub fn flux2_klein(prompt: &str) -> Templated {
    let text = format!("{}<think>\n\n</think>\n\n", chatml(None, prompt));
    Templated { text, dropped: 0 }
}

/// Qwen-Image: of the ids, the prompt's and the five behind it stay.
pub fn qwen_image(prompt: &str) -> Templated {
    Templated { text: chatml(Some(QWEN_IMAGE_SYSTEM), prompt), dropped: QWEN_IMAGE_DROPPED }
}

/// HunyuanVideo 1.5's language model; an empty prompt is one space.
pub fn hunyuan_video15(prompt: &str) -> Templated {
    let prompt = if prompt.is_empty() { " " } else { prompt };
    let text = chatml(Some(HUNYUAN_VIDEO15_SYSTEM), prompt);
    Templated { text, dropped: HUNYUAN_VIDEO15_DROPPED }
}

/// A question, and the mark at which the answer begins.
fn chatml(system: Option<&str>, prompt: &str) -> String {
    let message = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let system = system.map(|text| message("system", text)).unwrap_or_default();
    format!("{system}{}<|im_start|>assistant\n", message("user", prompt))
}
