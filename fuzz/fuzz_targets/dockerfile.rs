//! Any text parses without a panic, spans stay in the text, and every word expands or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovenbird_dockerfile::expand::{EmptyEnv, Expander};
use ovenbird_dockerfile::{diagnostic, lint, mount, parse, parse_instruction};

fuzz_target!(|text: &str| {
    let parsed = parse(text);
    let check = parsed.dockerfile.directives.check.as_deref().unwrap_or_default();
    let config = lint::CheckConfig::parse(check).unwrap_or_default();
    let findings = parsed.diagnostics.iter().cloned().chain(lint::lint(&parsed.dockerfile, text, &config));
    for finding in findings {
        assert!(text.get(finding.span.start..finding.span.end).is_some(), "{finding:?}");
        let _ = diagnostic::render(&finding, "Dockerfile", text);
    }
    let _ = parse_instruction(text, '`');
    let _ = mount::parse(text);
    for (keep_unset, raw_quotes) in [(false, false), (true, false), (false, true)] {
        let expander = Expander { escape: '\\', keep_unset, raw_quotes };
        let _ = expander.words(text, &EmptyEnv);
        let _ = expander.heredoc(text, &EmptyEnv);
    }
});
