{{/* Prefix of all objects: the release's name, with "joulecast" in it exactly once. */}}
{{- define "joulecast.prefix" -}}
{{- if contains "joulecast" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-joulecast" (.Release.Name | trunc 30 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "joulecast.operator" -}}
{{- include "joulecast.prefix" . }}-operator
{{- end -}}

{{/* Labels that never change: what selectors may use. */}}
{{- define "joulecast.selectorLabels" -}}
app.kubernetes.io/name: joulecast-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "joulecast.labels" -}}
{{ include "joulecast.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: joulecast
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "joulecast.operatorImage" -}}
{{- .Values.operator.image | default (printf "localhost/joulecast/operator:%s" .Chart.AppVersion) -}}
{{- end -}}

{{- define "joulecast.runtimeImage" -}}
{{- .Values.runtime.image | default (printf "localhost/joulecast/runtime:%s" .Chart.AppVersion) -}}
{{- end -}}

{{- define "joulecast.progressSecret" -}}
{{- .Values.progressKey.existingSecret | default (printf "%s-progress-key" (include "joulecast.prefix" .)) -}}
{{- end -}}

{{/* The operator's configuration file; operator/src/config.rs describes it. */}}
{{- define "joulecast.config" -}}
runtimes:
  - image: {{ include "joulecast.runtimeImage" . | quote }}
    pullPolicy: {{ .Values.runtime.imagePullPolicy }}
    engines: {{ toJson .Values.runtime.engines }}
    providers: {{ toJson .Values.runtime.providers }}
  {{- range .Values.extraRuntimes }}
  - image: {{ .image | quote }}
    pullPolicy: {{ .imagePullPolicy | default "IfNotPresent" }}
    engines: {{ toJson .engines }}
    providers: {{ toJson .providers }}
  {{- end }}
podDefaults:
  resources:
    {{- toYaml .Values.runtime.resources | nindent 4 }}
{{- if .Values.agent.enabled }}
slots: {{ ternary "[cpu, cuda]" "[cpu]" .Values.agent.cuda.enabled }}
{{- if and .Values.agent.cuda.enabled (eq .Values.agent.cuda.devices "NvidiaPlugin") }}
gpuResource: nvidia.com/gpu
{{- end }}
{{- end }}
{{- with .Values.watts }}
watts:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .Values.networkPolicy.enabled }}
networkPolicy:
  operator:
    namespaceSelector:
      matchLabels:
        kubernetes.io/metadata.name: {{ .Release.Namespace }}
    podSelector:
      matchLabels:
        {{- include "joulecast.selectorLabels" . | nindent 8 }}
  extraFrom: {{ toJson .Values.networkPolicy.extraFrom }}
{{- end }}
retries:
  {{- toYaml .Values.retries | nindent 2 }}
energyModels:
  learnFrom: {{ toJson .Values.energyModels.learnFrom }}
{{- with .Values.devices }}
devices:
  {{- toYaml . | nindent 2 }}
{{- end }}
progressSeconds: {{ .Values.progressSeconds }}
{{- end -}}

{{- define "joulecast.agent" -}}
{{- include "joulecast.prefix" . }}-device-plugin
{{- end -}}

{{- define "joulecast.agentSelectorLabels" -}}
app.kubernetes.io/name: joulecast-device-plugin
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: node-agent
{{- end -}}

{{- define "joulecast.agentLabels" -}}
{{ include "joulecast.agentSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: joulecast
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "joulecast.agentImage" -}}
{{- .Values.agent.image | default (printf "localhost/joulecast/device-plugin:%s" .Chart.AppVersion) -}}
{{- end -}}
