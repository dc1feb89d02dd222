//! Chat templates: the Jinja text that a model brings along, run with the settings that transformers uses.
//!
//! Left out on purpose: `strftime_now` (a prompt that depends on the clock cannot be repeated; templates that ask
//! whether it is defined take their fixed date) and the `tools` and `documents` arguments.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use super::{TokenizerError, read_limited};

/// Steps that one rendering may take. A template of a real model needs some ten per message.
const FUEL: u64 = 5_000_000;

/// A model's chat template, ready to render.
pub(super) struct ChatTemplate {
    /// With the template under the name `chat`, or why it cannot be used: a job without `messages` does not need it.
    environment: Result<Environment<'static>, String>,
    special: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// Looks for a template: `chat_template.jinja` first, then `chat_template` in `config` (tokenizer_config.json),
    /// which is a string or a list of named ones, of which `default` is taken.
    pub(super) fn find(dir: &Path, config: &Value) -> Result<Option<Self>, TokenizerError> {
        let file = dir.join("chat_template.jinja");
        let source = match read_limited(&file)? {
            Some(bytes) => String::from_utf8(bytes)
                .map_err(|e| TokenizerError::File { path: file, problem: format!("not UTF-8: {e}") })?,
            None => match &config["chat_template"] {
                Value::Null => return Ok(None),
                Value::String(text) => text.clone(),
                Value::Array(list) => match list.iter().find(|t| t["name"] == "default").map(|t| &t["template"]) {
                    Some(Value::String(text)) => text.clone(),
                    _ => {
                        return Ok(Some(Self::broken(
                            "tokenizer_config.json lists templates, but none named `default`",
                        )));
                    }
                },
                _ => {
                    return Ok(Some(Self::broken("chat_template in tokenizer_config.json is neither text nor a list")));
                }
            },
        };
        let special = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"]
            .into_iter()
            .filter_map(|name| Some((name, special_token(config, name)?)))
            .collect();
        Ok(Some(Self { environment: environment(source), special }))
    }

    fn broken(problem: &str) -> Self {
        Self { environment: Err(problem.to_owned()), special: Vec::new() }
    }

    pub(super) fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String, TokenizerError> {
        let environment = self.environment.as_ref().map_err(|e| TokenizerError::Chat(e.clone()))?;
        let messages = messages.iter().enumerate().map(flatten).collect::<Result<Vec<Value>, _>>()?;
        let template = environment.get_template("chat").map_err(|e| TokenizerError::Chat(explain(&e)))?;
        let special: BTreeMap<&str, &str> = self.special.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let special = minijinja::Value::from(Serde(special));
        template
            .render(context! {
                messages => minijinja::Value::from(Serde(&messages)),
                add_generation_prompt => add_generation_prompt,
                ..special
            })
            .map_err(|e| TokenizerError::Chat(explain(&e)))
    }
}

/// A special token of tokenizer_config.json: a string, or an object with `content`.
pub(super) fn special_token(config: &Value, name: &str) -> Option<String> {
    match &config[name] {
        Value::String(text) => Some(text.clone()),
        object => object["content"].as_str().map(str::to_owned),
    }
}

fn environment(source: String) -> Result<Environment<'static>, String> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| explain(&e))?;
    env.set_syntax(syntax);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_filter("tojson", tojson);
    env.add_template_owned("chat", source).map_err(|e| explain(&e))?;
    Ok(env)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`. The engine's own filter escapes for HTML.
fn tojson(value: minijinja::Value, kwargs: minijinja::value::Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let done = match indent {
        Some(n) => {
            let spaces = vec![b' '; n.min(64)];
            let format = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, format))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormat)),
    };
    done.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))?;
    String::from_utf8(out).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON on one line with a space after each comma and colon.
struct PythonFormat;

impl serde_json::ser::Formatter for PythonFormat {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Checks one message and turns a list of text parts into one string.
fn flatten((index, message): (usize, &Value)) -> Result<Value, TokenizerError> {
    let fail = |problem: String| TokenizerError::Message { index, problem };
    let Value::Object(fields) = message else {
        return Err(fail("not an object with `role` and `content`".into()));
    };
    if !fields.get("role").is_some_and(Value::is_string) {
        return Err(fail("`role` is missing or not a string".into()));
    }
    let mut fields = fields.clone();
    if let Some(Value::Array(parts)) = fields.get("content") {
        let mut text = String::new();
        for (at, part) in parts.iter().enumerate() {
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(piece)) => text.push_str(piece),
                (kind, _) => {
                    let kind = kind.unwrap_or("(none)");
                    return Err(fail(format!(
                        "content[{at}]: type {kind}; this runtime takes parts of type text only"
                    )));
                }
            }
        }
        fields.insert("content".into(), Value::String(text));
    }
    Ok(Value::Object(fields))
}

/// A template error as one line that tells what the template wanted.
fn explain(error: &minijinja::Error) -> String {
    let line = error.line().map(|l| format!(" (template line {l})")).unwrap_or_default();
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        ErrorKind::InvalidOperation => format!("{detail}{line}"),
        ErrorKind::UnknownFunction if detail.contains("strftime_now") => format!(
            "it calls strftime_now, which this runtime does not offer: a prompt must not depend on the clock; \
             give the model a chat_template.jinja with a fixed date{line}"
        ),
        ErrorKind::OutOfFuel => format!("it ran longer than {FUEL} steps{line}"),
        kind => format!("{kind}: {detail}{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, messages: &[Value], prompt: bool) -> Result<String, String> {
        let config = json!({"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        let dir = tempfile::tempdir().unwrap();
        ChatTemplate::find(dir.path(), &config).unwrap().unwrap().render(messages, prompt).map_err(|e| e.to_string())
    }

    #[test]
    fn templates_as_models_bring_them() {
        let chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let user = json!({"role": "user", "content": " fn main() "});
        assert_eq!(
            render(chatml, std::slice::from_ref(&user), true).unwrap(),
            "<|im_start|>user\n fn main() <|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(
            render(chatml, std::slice::from_ref(&user), false).unwrap(),
            "<|im_start|>user\n fn main() <|im_end|>\n"
        );

        let llama = "{{ bos_token }}{% for m in messages %}\n    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}\n        {{- raise_exception('roles must alternate') }}\n    {%- endif %}\n    {{- '[INST] ' + m.content.strip() + ' [/INST]' }}{% endfor %}{{ eos_token }}";
        assert_eq!(render(llama, std::slice::from_ref(&user), true).unwrap(), "<s>[INST] fn main() [/INST]</s>");
        let err = render(llama, &[json!({"role": "assistant", "content": "x"})], true).unwrap_err();
        assert!(err.contains("roles must alternate"), "{err}");

        // Blocks alone on a line leave nothing behind, a template's last line break is dropped, and `break` works.
        let blocks = "{% for m in messages %}\n    {% if loop.index0 == 1 %}\n        {% break %}\n    {% endif %}\n{{ m.content }}\n{% endfor %}\nend\n";
        assert_eq!(render(blocks, &[user.clone(), user.clone()], true).unwrap(), " fn main() \nend");

        let dated = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26 Jul 2024{% endif %}";
        assert_eq!(render(dated, &[], true).unwrap(), "26 Jul 2024");
        let err = render("{{ strftime_now('%d') }}", &[], true).unwrap_err();
        assert!(err.contains("strftime_now") && err.contains("clock"), "{err}");
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let user = json!({"role": "user", "content": {"a": [1, "<é>\n", null, true], "b": {}}});
        assert_eq!(
            render("{{ messages[0].content | tojson }}", std::slice::from_ref(&user), true).unwrap(),
            r#"{"a": [1, "<é>\n", null, true], "b": {}}"#
        );
        assert_eq!(
            render("{{ messages[0].content.a[:2] | tojson(indent=2) }}", &[user], true).unwrap(),
            "[\n  1,\n  \"<é>\\n\"\n]"
        );
    }

    #[test]
    fn messages_that_a_text_model_cannot_take() {
        let t = "{{ messages[0].content }}";
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(render(t, &[parts], true).unwrap(), "ab");
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
        let cases = [
            (image, "messages[0]: content[0]: type image_url"),
            (json!("hi"), "messages[0]: not an object"),
            (json!({"content": "x"}), "messages[0]: `role` is missing"),
        ];
        for (message, want) in cases {
            let err = render(t, std::slice::from_ref(&message), true).unwrap_err();
            assert!(err.contains(want), "{message}: {err}");
        }
    }

    #[test]
    fn a_broken_or_endless_template_is_an_error_of_the_request() {
        let err = render("{% for %}", &[], true).unwrap_err();
        assert!(err.contains("syntax error"), "{err}");
        let err =
            render("{% for i in range(9999) %}{% for j in range(9999) %}{{ j }}{% endfor %}{% endfor %}", &[], true)
                .unwrap_err();
        assert!(err.contains("steps"), "{err}");
    }

    #[test]
    fn the_default_of_several_templates_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
        let found = ChatTemplate::find(dir.path(), &config).unwrap().unwrap();
        assert_eq!(found.render(&[], true).unwrap(), "d");
        std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
        let found = ChatTemplate::find(dir.path(), &config).unwrap().unwrap();
        assert_eq!(found.render(&[], true).unwrap(), "file");
    }
}
