//! Generated pages of docs/reference say what the program does. `OVENBIRD_UPDATE=1 cargo test -p ovenbird --test reference` writes them.

use std::fmt::Write as _;
use std::path::Path;

use ovenbird::workflow::reference;
use serde_json::Value;

fn check(page: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference").join(page);
    if option_env!("OVENBIRD_UPDATE").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == text, "docs/reference/{page} is out of date: OVENBIRD_UPDATE=1 cargo test -p ovenbird --test reference");
}

/// A type as people read it.
fn kind(root: &Value, schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
        return kind(root, &root["$defs"][name]);
    }
    if let Some(options) = schema["enum"].as_array() {
        return options.iter().map(|option| format!("`{}`", option.as_str().unwrap_or_default())).collect::<Vec<_>>().join(" or ");
    }
    if let Some(options) = schema["anyOf"].as_array().or_else(|| schema["oneOf"].as_array()) {
        let known: Vec<String> = options.iter().filter(|o| o["type"] != "null").map(|option| kind(root, option)).collect();
        return known.join(" or ");
    }
    let one = |name: &str| match name {
        "array" => format!("list of {}", kind(root, &schema["items"])),
        "object" if schema.get("properties").is_some() => {
            let fields = schema["properties"].as_object().unwrap().iter().map(|(name, field)| format!("`{name}`: {}", kind(root, field)));
            format!("object ({})", fields.collect::<Vec<_>>().join(", "))
        }
        "object" => format!("object of {}", kind(root, &schema["additionalProperties"])),
        "string" => "text".to_owned(),
        "integer" => "number".to_owned(),
        other => other.to_owned(),
    };
    match &schema["type"] {
        Value::String(name) => one(name),
        Value::Array(names) => {
            let mut known: Vec<String> = names.iter().filter_map(Value::as_str).filter(|name| *name != "null").map(one).collect();
            known.dedup();
            known.join(" or ")
        }
        _ => "anything".to_owned(),
    }
}

#[test]
fn plugins() {
    let mut page = String::from(
        "# Plugins that come with Ovenbird\n\nGenerated from the program; see [the workflow guide](../guides/workflow.md) for how they are asked for, and \
         [writing a plugin](../guides/plugins.md).\nEvery plugin also takes `on_failure`, `required`, `timeout` and `secrets`. \
         An unknown argument is an error before the build starts.\n\nA project's own file may ask for a plugin only where the page says so, unless \
         the user trusts the project.\n\n",
    );
    for plugin in reference() {
        let phases: Vec<&str> = plugin.phases.iter().map(|phase| phase.as_str()).collect();
        let asks = if plugin.reaches_out { "trusted projects only" } else { "any project" };
        let about = plugin.schema["description"].as_str().unwrap_or_default();
        write!(page, "## {}\n{about}\n\nPhases: {}. May be asked for by {asks}.\n\n", plugin.name, phases.join(", ")).unwrap();
        let arguments = plugin.schema["properties"].as_object().cloned().unwrap_or_default();
        if arguments.is_empty() {
            page.push_str("No arguments.\n\n");
            continue;
        }
        page.push_str("| argument | type | default | what |\n|---|---|---|---|\n");
        for (name, schema) in &arguments {
            let needed = plugin.schema["required"].as_array().is_some_and(|names| names.iter().any(|one| one == name));
            let default = match &schema.get("default") {
                _ if needed => "required".to_owned(),
                None | Some(Value::Null) => String::new(),
                Some(value) => format!("`{value}`"),
            };
            let what = schema["description"].as_str().unwrap_or_default().replace('\n', " ");
            writeln!(page, "| `{name}` | {} | {default} | {what} |", kind(&plugin.schema, schema)).unwrap();
        }
        page.push('\n');
    }
    check("plugins.md", &format!("{}\n", page.trim_end()));
}

#[test]
fn report() {
    let text = serde_json::to_string_pretty(&ovenbird::report::schema()).unwrap();
    check("report.schema.json", &format!("{text}\n"));
}
