//! The specification: committed, served, complete.

use serde_json::Value;

use crate::support::TestApp;

#[test]
fn committed_specification_is_the_one_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.yaml");
    let committed = std::fs::read_to_string(path).expect("openapi.yaml is committed");
    let generated = lorad::http::openapi::specification_yaml().expect("YAML");
    assert!(committed == generated, "openapi.yaml is out of date: run `cargo run --release -- openapi > openapi.yaml`");
}

#[tokio::test]
async fn specification_is_served_in_both_forms() {
    let app = TestApp::start().await;
    let json = app.get_json("/openapi.json").await;
    assert_eq!(json["openapi"].as_str().map(|version| &version[..2]), Some("3."));
    for path in ["/v1/files", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", "/v1/artifacts/{artifact_id}/content"]
    {
        assert!(json["paths"][path].is_object(), "{path}");
    }
    // Words as the API spells them, not as the code names its variants.
    let words = |name: &str| json["components"]["schemas"][name]["enum"].clone();
    assert_eq!(words("ArtifactType"), serde_json::json!(["adapter", "gguf", "gguf_lora", "merged", "ollama"]));
    assert_eq!(words("Quantization")[8], "q4_k_m");
    let yaml = app.get("/openapi.yaml").await.text().await.expect("a body");
    assert_eq!(yaml, lorad::http::openapi::specification_yaml().expect("YAML"));
}

#[test]
fn every_answer_is_described_and_every_error_wears_the_envelope() {
    let specification = serde_json::to_value(lorad::http::openapi::specification()).expect("JSON");
    let object = |value: &Value| value.as_object().expect("an object").clone();
    for (path, operations) in object(&specification["paths"]) {
        for (method, operation) in object(&operations) {
            let answers = object(&operation["responses"]);
            assert!(!answers.contains_key("default"), "{method} {path} leaves its errors open");
            assert!(answers.contains_key("403") && answers.contains_key("5XX"), "{method} {path}");
            for (status, answer) in answers {
                assert!(answer["headers"]["x-request-id"].is_object(), "{method} {path} {status}");
                if status.starts_with(['4', '5']) {
                    let body = &answer["content"]["application/json"]["schema"]["$ref"];
                    assert_eq!(body, "#/components/schemas/ErrorBody", "{method} {path} {status}");
                }
            }
        }
    }
    let error = &specification["components"]["schemas"]["ErrorObject"];
    assert_eq!(error["required"], serde_json::json!(["message", "type", "param", "code"]));
}
