//! Arguments of plugins against their JSON schema: typed text becomes values, and what does not fit is named.
//!
//! A subset of JSON Schema: `type`, `properties`, `required`, `enum`, `items`, `additionalProperties`, `anyOf` and `$ref` into `$defs`.
//! Unknown arguments are always refused, whatever a schema says of `additionalProperties` at its top.

use ovenbird_dockerfile::suggest;
use serde_json::{Map, Value};

/// Deepest schema that is followed.
const MOST_DEPTH: usize = 32;

/// Arguments as typed on a command line, by the types of the schema. `key.part=value` is an entry of an object, a key given again one more
/// item of a list.
pub(super) fn from_text(schema: &Value, args: &mut Map<String, Value>, typed: &[(String, String)]) -> Result<(), String> {
    for (key, text) in typed {
        let (name, part) = match key.split_once('.') {
            Some((name, part)) if property(schema, key).is_none() => (name, Some(part)),
            _ => (key.as_str(), None),
        };
        let name = &name.replace('-', "_");
        let Some(wanted) = property(schema, name) else { return Err(unknown(schema, name)) };
        match part {
            Some(part) if has_type(schema, wanted, "object") => {
                let slot = args.entry(name.clone()).or_insert_with(|| Value::Object(Map::new()));
                let Some(object) = slot.as_object_mut() else { return Err(format!("{name} is given twice, in different ways")) };
                let inner = wanted.get("additionalProperties").unwrap_or(&Value::Null);
                object.insert(part.to_owned(), scalar(schema, inner, text));
            }
            Some(_) => return Err(unknown(schema, key)),
            None if has_type(schema, wanted, "array") && !text.starts_with('[') => {
                let items = resolve(schema, wanted).get("items").unwrap_or(&Value::Null);
                let item = scalar(schema, items, text);
                let slot = args.entry(name.clone()).or_insert_with(|| Value::Array(vec![]));
                let Some(list) = slot.as_array_mut() else { return Err(format!("{name} is given twice, in different ways")) };
                list.push(item);
            }
            None => {
                if args.insert(name.clone(), scalar(schema, wanted, text)).is_some() {
                    return Err(format!("{name} is given twice"));
                }
            }
        }
    }
    Ok(())
}

/// Text stays text where that is wanted; else it is JSON if it is any.
fn scalar(root: &Value, schema: &Value, text: &str) -> Value {
    let as_text = || Value::String(text.to_owned());
    let others = ["integer", "number", "boolean", "array", "object"].iter().any(|kind| has_type(root, schema, kind));
    if others { serde_json::from_str(text).unwrap_or_else(|_| as_text()) } else { as_text() }
}

fn property<'a>(schema: &'a Value, name: &str) -> Option<&'a Value> {
    schema.get("properties")?.get(name)
}

fn unknown(schema: &Value, name: &str) -> String {
    let known: Vec<&str> =
        schema.get("properties").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    let near = suggest::nearest(name, known.iter().copied()).map(|near| format!("; did you mean {near:?}?"));
    let known = if known.is_empty() { "it takes none".to_owned() } else { format!("it takes {}", known.join(", ")) };
    format!("unknown argument {name:?}: {known}{}", near.unwrap_or_default())
}

/// Follows a `$ref` into `$defs`.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let target = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix("#/"));
    let found = target.and_then(|path| path.split('/').try_fold(root, |value, key| value.get(key)));
    found.unwrap_or(schema)
}

fn has_type(root: &Value, schema: &Value, wanted: &str) -> bool {
    let schema = resolve(root, schema);
    let any = |key: &str| schema.get(key).and_then(Value::as_array).is_some_and(|list| list.iter().any(|one| has_type(root, one, wanted)));
    match schema.get("type") {
        Some(Value::String(kind)) => kind == wanted,
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == wanted),
        _ => any("anyOf") || any("oneOf"),
    }
}

/// Says what of the arguments does not fit.
pub(super) fn check(schema: &Value, args: &Map<String, Value>) -> Result<(), String> {
    if let Some(name) = args.keys().find(|name| property(schema, name).is_none()) {
        return Err(unknown(schema, name));
    }
    check_value(schema, schema, &Value::Object(args.clone()), "", 0)
}

fn check_value(root: &Value, schema: &Value, value: &Value, at: &str, depth: usize) -> Result<(), String> {
    if depth > MOST_DEPTH {
        return Err(format!("{at}: its schema is too deep"));
    }
    let schema = resolve(root, schema);
    let here = if at.is_empty() { "the arguments" } else { at };
    if let Some(options) = schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
        let mut failed = None;
        for option in options {
            match check_value(root, option, value, at, depth + 1) {
                Ok(()) => return Ok(()),
                // What is about `null` says nothing.
                Err(error) if option.get("type") != Some(&Value::String("null".into())) => failed = Some(error),
                Err(_) => {}
            }
        }
        return failed.map_or(Ok(()), Err);
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        return Err(format!("{here} is {value}, expected {}", allowed.join(" or ")));
    }
    let kinds: Vec<&str> = match schema.get("type") {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => vec![],
    };
    let is = |kind: &str| match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => true,
    };
    if !kinds.is_empty() && !kinds.iter().any(|kind| is(kind)) {
        return Err(format!("{here} is {value}, expected {}", kinds.join(" or ")));
    }
    match value {
        Value::Object(object) => {
            for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
                if !object.contains_key(name) {
                    return Err(format!("the argument {:?} is missing", [at, name].join(if at.is_empty() { "" } else { "." })));
                }
            }
            for (name, value) in object {
                let inner = schema.get("properties").and_then(|all| all.get(name));
                let Some(inner) = inner.or_else(|| schema.get("additionalProperties")) else { continue };
                let at = [at, name].join(if at.is_empty() { "" } else { "." });
                if inner == &Value::Bool(false) {
                    return Err(format!("unknown argument {at:?}"));
                }
                check_value(root, inner, value, &at, depth + 1)?;
            }
        }
        Value::Array(items) => {
            let Some(inner) = schema.get("items") else { return Ok(()) };
            for (number, item) in items.iter().enumerate() {
                check_value(root, inner, item, &format!("{at}[{number}]"), depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn typed_and_checked() {
        let schema = json!({
            "type": "object",
            "properties": {
                "text": {"type": "string"}, "count": {"type": "integer"}, "list": {"type": "array", "items": {"type": "string"}},
                "set": {"type": "object", "additionalProperties": {"type": "string"}}, "maybe": {"type": ["integer", "null"]},
                "one": {"enum": ["a", "b"]}, "deep": {"$ref": "#/$defs/deep"}
            },
            "required": ["text"],
            "$defs": {"deep": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": false}}
        });
        let told = |typed: &[(&str, &str)]| {
            let mut args = Map::new();
            let typed: Vec<(String, String)> = typed.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            match from_text(&schema, &mut args, &typed).and_then(|()| check(&schema, &args)) {
                Ok(()) => Value::Object(args).to_string(),
                Err(error) => format!("! {error}"),
            }
        };
        for (typed, expect) in [
            (&[("text", "1.10")][..], r#"{"text":"1.10"}"#),
            (&[("text", "t"), ("count", "7"), ("maybe", "3")], r#"{"text":"t","count":7,"maybe":3}"#),
            (&[("text", "t"), ("list", "a"), ("list", "b=c")], r#"{"text":"t","list":["a","b=c"]}"#),
            (&[("text", "t"), ("list", r#"["x","y"]"#)], r#"{"text":"t","list":["x","y"]}"#),
            (&[("text", "t"), ("set.org.a", "1")], r#"{"text":"t","set":{"org.a":"1"}}"#),
            (&[], "! the argument \"text\" is missing"),
            (&[("text", "t"), ("count", "x")], "! count is \"x\", expected integer"),
            (&[("txt", "t")], "! unknown argument \"txt\": it takes text, count, list, set, maybe, one, deep; did you mean \"text\"?"),
            (&[("text", "a"), ("text", "b")], "! text is given twice"),
            (&[("text", "t"), ("one", "c")], "! one is \"c\", expected \"a\" or \"b\""),
            (&[("text", "t"), ("deep", r#"{"y":true}"#)], "! unknown argument \"deep.y\""),
            (&[("text", "t"), ("deep", r#"{"x":1}"#)], "! deep.x is 1, expected boolean"),
        ] {
            assert_eq!(told(typed), expect, "{typed:?}");
        }
    }
}
