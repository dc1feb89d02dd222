//! Bounds for the types that are Kubernetes' own: their published schemas have none, and an API without bounds takes
//! whatever fits into a request. The figures are those that Kubernetes itself validates by where the values end up.

use schemars::Schema;
use serde_json::{Value, json};

/// Most characters of a label's value.
const LABEL_VALUE: u32 = 63;
/// Most characters of a label's key: a DNS name, a slash and a name.
const LABEL_KEY: u32 = 253 + 1 + 63;
/// Most characters of an object's name.
const NAME: u32 = 253;

/// Sets a keyword at a place in a schema.
///
/// # Panics
/// If the schema has no such place: the types changed under us, which the generated CRDs' own test shows.
fn set(schema: &mut Schema, place: &str, keyword: &str, value: Value) {
    let found = schema.pointer_mut(place).and_then(Value::as_object_mut);
    found.unwrap_or_else(|| panic!("no {place} in the schema of a type of Kubernetes")).insert(keyword.into(), value);
}

/// Values of labels and node labels.
pub(crate) fn label_values(schema: &mut Schema) {
    set(schema, "/additionalProperties", "maxLength", json!(LABEL_VALUE));
}

/// A list of tolerations.
pub(crate) fn tolerations(schema: &mut Schema) {
    set(schema, "/items/properties/key", "maxLength", json!(LABEL_KEY));
    set(schema, "/items/properties/value", "maxLength", json!(LABEL_VALUE));
    set(schema, "/items/properties/operator", "maxLength", json!(16));
    set(schema, "/items/properties/effect", "maxLength", json!(32));
}

/// A list of references to objects by name.
pub(crate) fn references(schema: &mut Schema) {
    set(schema, "/items/properties/name", "maxLength", json!(NAME));
}

/// Resources of a container. Claims are left out: they name entries of the pod, which a job cannot give.
pub(crate) fn resources(schema: &mut Schema) {
    for kind in ["limits", "requests"] {
        set(schema, &format!("/properties/{kind}"), "maxProperties", json!(32));
        let quantity = format!("/properties/{kind}/additionalProperties");
        set(schema, &quantity, "maxLength", json!(64));
        set(schema, &quantity, "description", json!("A quantity, for example \"500m\", 2 or \"3Gi\"."));
    }
    if let Some(properties) = schema.pointer_mut("/properties").and_then(Value::as_object_mut) {
        properties.remove("claims");
    }
}

/// A list of conditions, merged by their type.
pub(crate) fn conditions(schema: &mut Schema) {
    set(schema, "", "x-kubernetes-list-type", json!("map"));
    set(schema, "", "x-kubernetes-list-map-keys", json!(["type"]));
    set(schema, "/items/properties/type", "maxLength", json!(LABEL_KEY));
    set(schema, "/items/properties/reason", "maxLength", json!(1024));
    set(schema, "/items/properties/message", "maxLength", json!(32_768));
    set(schema, "/items/properties/status", "enum", json!(["True", "False", "Unknown"]));
}
