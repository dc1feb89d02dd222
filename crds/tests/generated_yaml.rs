//! The CRD files (plain under `crds/yaml`, templated in the chart) are generated from the types. This test fails when
//! one is stale; `make generate` (the same test with `REWRITE=1`) rewrites them.
#![allow(missing_docs)]

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
