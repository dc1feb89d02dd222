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
app.kubernetes.io/name: joulecast
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

{{/* The operator's configuration file. */}}
{{- define "joulecast.config" -}}
runtimeImage: {{ include "joulecast.runtimeImage" . | quote }}
runtimeImagePullPolicy: {{ .Values.runtime.imagePullPolicy }}
{{- end -}}
