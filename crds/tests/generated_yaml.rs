//! The CRD files (plain under `crds/yaml`, templated in the chart) are generated from the types. This test fails when
//! one is stale; `make generate` (the same test with `REWRITE=1`) rewrites them.
#![allow(missing_docs)]

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Rewrites a stale file if asked to; otherwise says which command would.
fn compare(path: &Path, expected: &str) {
    if std::env::var_os("REWRITE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, expected).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(found == expected, "{} is stale: run `make generate` and commit the result", path.display());
}

#[test]
fn crd_files_are_those_of_the_types() {
    for (name, mut definition) in joulecast_crds::definitions() {
        let plain = serde_yaml::to_string(&definition).unwrap();
        assert!(plain.len() < 256 * 1024, "{name}: client-side apply keeps a copy in an annotation of 256 KiB at most");
        assert!(!plain.contains("{{"), "{name}: a description holds a template bracket, which Helm would interpret");
        assert!(!plain.contains("type: number"), "{name}: floats never stand in the API");
        compare(
            &repository().join(format!("crds/yaml/{name}.yaml")),
            &format!("# Generated from the types by `make generate`.\n{plain}"),
        );

        // Helm neither upgrades nor keeps what lies in a chart's crds/ folder as users expect: so the CRDs are
        // templates, and the policy keeps them (and every job) when the release is uninstalled.
        let annotations = definition.metadata.annotations.get_or_insert_default();
        annotations.insert("helm.sh/resource-policy".into(), "keep".into());
        let kept = serde_yaml::to_string(&definition).unwrap();
        let templated = format!(
            "{{{{- /* Generated from the types by `make generate`. */ -}}}}\n{{{{- if .Values.crds.install }}}}\n{kept}{{{{- end }}}}\n"
        );
        compare(&repository().join(format!("charts/joulecast/templates/crds/{name}.yaml")), &templated);
    }
}

/// Visits a schema and all below it, each with its path.
fn walk(schema: &JSONSchemaProps, path: &str, visit: &mut dyn FnMut(&str, &JSONSchemaProps)) {
    visit(path, schema);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &schema.items {
        walk(items, &format!("{path}[]"), visit);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &schema.additional_properties {
        walk(values, &format!("{path}{{}}"), visit);
    }
    for (name, property) in schema.properties.iter().flatten() {
        walk(property, &format!("{path}.{name}"), visit);
    }
}

fn visit_all(mut visit: impl FnMut(&str, &JSONSchemaProps)) {
    for (kind, definition) in joulecast_crds::definitions() {
        for version in definition.spec.versions {
            let schema = version.schema.and_then(|schema| schema.open_api_v3_schema).unwrap();
            walk(&schema, kind, &mut visit);
        }
    }
}

#[test]
fn every_string_list_and_map_is_bounded() {
    let (mut seen, mut unbounded) = (0, Vec::new());
    visit_all(|path, schema| {
        seen += 1;
        let text = schema.type_.as_deref() == Some("string") || schema.x_kubernetes_int_or_string == Some(true);
        let free_text = text && schema.enum_.is_none() && schema.format.as_deref() != Some("date-time");
        let free_list = schema.type_.as_deref() == Some("array");
        let anything = schema.x_kubernetes_preserve_unknown_fields == Some(true);
        if free_text && schema.max_length.is_none()
            || free_list && schema.max_items.is_none()
            || schema.additional_properties.is_some() && schema.max_properties.is_none()
            || anything
        {
            unbounded.push(path.to_owned());
        }
    });
    assert!(seen > 300, "{seen} schemas: what is walked is not the API");
    assert!(unbounded.is_empty(), "without a bound: {unbounded:#?}");
}

#[test]
fn every_field_has_a_text_for_kubectl_explain() {
    let mut silent = Vec::new();
    visit_all(|path, schema| {
        // Items and values speak for themselves in the text of their list or map; `metadata` is Kubernetes' own.
        let named = path.rsplit_once('.').is_some_and(|(_, name)| !name.ends_with("[]") && !name.ends_with("{}"));
        if named && schema.description.as_deref().is_none_or(|text| text.trim().is_empty()) {
            silent.push(path.to_owned());
        }
    });
    assert!(silent.is_empty(), "without a description: {silent:#?}");
}

/// A pattern refuses with a regular expression; a rule has a message. The numbers of an EnergyModel are many, written by
/// programs, and too dear for rules.
#[test]
fn what_users_write_is_refused_in_words() {
    visit_all(|path, schema| {
        let by_programs = path.contains(".status") || path.starts_with("energymodels.spec.fit");
        assert!(by_programs || schema.pattern.is_none(), "{path} has a pattern");
        for rule in schema.x_kubernetes_validations.iter().flatten() {
            let told = rule.message.as_deref().unwrap_or_default();
            assert!(told.len() > 10 || rule.message_expression.is_some(), "{path}: a rule without a message");
        }
    });
}
